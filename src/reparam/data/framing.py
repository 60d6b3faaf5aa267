"""What is added to chats that do not have it: a system message, and whether the model thinks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from reparam.data.chat import ChatTemplate
from reparam.data.messages import Messages, string_problem
from reparam.data.row import Row
from reparam.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Frame:
    """What is added to chats. The default adds nothing."""

    system: str | None = None
    """System message of chats without one (or without one of the role developer); "" is none."""
    variables: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Variables of the chat template for chats that do not set them."""

    def messages(self, given: Messages) -> Messages:
        """The messages of a chat with the system message.

        >>> Frame("Be brief.").messages([{"role": "user", "content": "hi"}])[0]
        {'role': 'system', 'content': 'Be brief.'}
        """
        has_one = any(message["role"] in ("system", "developer") for message in given)
        return [{"role": "system", "content": self.system}, *given] if self.system and not has_one else given

    def rows(self, given: Iterable[Row]) -> Iterator[Row]:
        """The rows, of which the chats are framed."""
        for row in given:
            if row.kind == "chat" and (self.system or self.variables):
                messages, variables = tuple(self.messages(row.messages)), {**self.variables, **row.variables}
                row = dataclasses.replace(row, messages=messages, variables=variables)
            yield row


def frame(
    tokenizer: PreTrainedTokenizerBase, *, system: str | None = None, thinking: bool | None = None, key: str = "data."
) -> Frame:
    """The frame of chats for the chat template of the tokenizer. `key` is put before the settings' names in errors.

    Raises DataError if the tokenizer has no chat template, if the template ignores or refuses system messages, and if
    `thinking` is set and the template has no variable for it.
    """
    if not system and thinking is None:
        return Frame(system)
    if not tokenizer.chat_template:
        name = "system" if system else "thinking"
        raise DataError([f"{key}{name}: is for chats, and the tokenizer has no chat template; leave it out"])
    template = ChatTemplate(tokenizer)
    if system and (problem := string_problem(system, f"{key}system")):
        raise DataError([problem])
    if system and not template.takes_system():
        raise DataError(
            [
                f"{key}system: the chat template ignores or refuses system messages; put the text into the first "
                "question, or choose another template with data.chat_template"
            ]
        )
    if thinking is None:
        return Frame(system)
    variable = template.thinking_variable()
    if variable is None:
        raise DataError([f"{key}thinking: nothing in the chat template depends on it; leave it out"])
    return Frame(system, {variable: thinking})
