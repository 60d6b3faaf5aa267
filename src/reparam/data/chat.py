"""Render chats with the template of a tokenizer, with the characters that carry loss.

`data/answers.py` finds the answers in the text, and `data/omissions.py` what the template leaves out.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from reparam.data.answers import PROBE, Answers, Render, Rendered, Span, text_or_none
from reparam.data.forms import Form
from reparam.data.messages import Messages, learned
from reparam.data.omissions import Omissions
from reparam.data.rendering import render, render_digests
from reparam.data.skeletons import Skeletons
from reparam.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINKING = ("enable_thinking", "thinking")  # names of the variable in the templates of model families
LossOn = Literal["answers", "last", "all"]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """A regular expression for the tokenizer's special tokens; longer tokens match first."""
    return _any_of(special_names(tokenizer))


def special_names(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The special tokens, but for those that are white space, as some added tokens are."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {token for token in added | set(tokenizer.all_special_tokens) if token.strip()}


def _any_of(tokens: Collection[str]) -> re.Pattern[str]:
    """A regular expression for the tokens that are not white space."""
    names = sorted((token for token in tokens if token.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or "(?!)")  # (?!) never matches


class ChatTemplate:
    """The chat template of a tokenizer, which must have one.

    The template runs in a process of its own, in jinja2's sandbox. Its errors are raised as ValueError; a template that
    cannot be read, or that takes too much time or memory, is refused with a DataError.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._template = tokenizer.get_chat_template()
        self._variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._specials = special_tokens(tokenizer)
        self._added = _any_of({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()})
        self._marked = re.search(r"\{%-?\s*generation\s*-?%\}", self._template) is not None
        self._form = Form()
        self._form = self._accepted_form()
        self._omissions = Omissions(self._renderer)
        self._begin_special = {name[0] for name in special_names(tokenizer)}
        self._plain: dict[str, Skeletons] = {}

    def render(
        self, messages: Messages, *, loss_on: LossOn, variables: Mapping[str, Any] | None = None
    ) -> list[Rendered]:
        """Render the chat, with the character ranges that carry loss: one text, or one for each answer.

        `loss_on` is "answers" (messages with the role "assistant"), "last" (only the last of them) or "all" (the whole
        text). An answer whose flag says so (such as `weight: 0` or `train: false`) carries no loss.
        `variables` are further variables of the template, such as `tools`.

        Raises ValueError if the template refuses the messages, ignores one of them, or drops content or tool calls.
        """
        rendered = self._renderer(variables or {})
        if loss_on == "all":
            text = rendered(messages)[0]
            result = [Rendered(text, [(0, len(text))])]
        else:
            answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            wanted = [i for i in (answers[-1:] if loss_on == "last" else answers) if learned(messages[i])]
            result = Answers(rendered, self._specials, marked=self._marked).find(messages, wanted)
        self._omissions.check(messages, result, rendered, variables or {})
        return result

    def render_plain(self, chats: Sequence[Messages], *, loss_on: LossOn) -> dict[int, list[Rendered]]:
        """As `render` does, the chats that can be rendered together (see `data/skeletons.py`), by their number."""
        if loss_on not in self._plain:
            render = functools.partial(self.render, loss_on=loss_on)
            self._plain[loss_on] = Skeletons(render, self._digests, self._specials, self._begin_special)
        return self._plain[loss_on](chats)

    def _digests(self, chats: Sequence[Messages]) -> Sequence[str | None]:
        """The SHA-256 of the texts of several chats without further variables, or None."""
        others = {"tools": None, "documents": None, **self._variables, "add_generation_prompt": False}
        formed = [[self._form.of(message) for message in chat] for chat in chats]
        return render_digests(self._template, others, formed)

    def prompt(self, messages: Messages, variables: Mapping[str, Any] | None = None) -> str:
        """The chat as text, up to where the next answer begins. Raises ValueError if the template refuses it."""
        return self._renderer(variables or {})(messages, generation_prompt=True)[0]

    def end_of_answer(self) -> str:
        """The added token with which the template ends the last answer of a chat; "" if there is none.

        Raises ValueError if the template refuses a chat of one question and one answer.
        """
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
        rendered = self._renderer({})
        text = rendered(messages)[0]
        at = text.rfind(PROBE)
        if at >= 0 and (found := self._added.search(text, at + len(PROBE))):
            return found.group()
        return Answers(rendered, self._specials, marked=self._marked).closing(messages, text)

    def takes_system(self) -> bool:
        """Whether the template writes a system message."""
        messages = [{"role": "system", "content": PROBE}, {"role": "user", "content": "a"}]
        return PROBE in (text_or_none(self._renderer({}), messages, generation_prompt=True) or "")

    def thinking_variable(self) -> str | None:
        """The variable that turns thinking on and off: one of `THINKING` that changes a text; None if none does."""
        asked = [{"role": "user", "content": "a"}]
        answered = [*asked, {"role": "assistant", "content": "b"}]
        for name in THINKING:
            on, off = (
                (text_or_none(render, asked, generation_prompt=True), text_or_none(render, answered))
                for render in (self._renderer({name: value}) for value in (True, False))
            )
            if on != off:
                return name
        return None

    def uses(self) -> dict[str, bool]:
        """Whether the keys of messages and the variables that were tried changed a text, since the last call."""
        return self._omissions.uses()

    def _renderer(self, variables: Mapping[str, Any]) -> Render:
        """The template with these variables. The texts of one chat are kept, because some are asked for twice."""
        kept: dict[tuple[Any, ...], tuple[str, list[Span]]] = {}

        def rendered(messages: Messages, *, generation_prompt: bool = False) -> tuple[str, list[Span]]:
            key = (generation_prompt, *map(id, messages))
            if key not in kept:
                kept[key] = self._text(messages, variables, generation_prompt)
                alive.extend(messages)  # an id is not given again
            return kept[key]

        alive: list[Mapping[str, Any]] = []
        return rendered

    def _text(
        self, messages: Messages, variables: Mapping[str, Any], generation_prompt: bool
    ) -> tuple[str, list[Span]]:
        """The rendered text, and the character ranges inside `{% generation %}`."""
        others = {
            "tools": None,
            "documents": None,
            **variables,
            **self._variables,
            "add_generation_prompt": generation_prompt,
        }
        return render(self._template, {**others, "messages": [self._form.of(message) for message in messages]})

    def _accepted_form(self) -> Form:
        """The form of messages that the template reads."""
        question: dict[str, Any] = {"role": "user", "content": PROBE}
        form = Form()
        if not self._writes(form, [question]) and self._writes(form._replace(parts=True), [question]):
            form = form._replace(parts=True)
        call = {"type": "function", "function": {"name": "f", "arguments": {"a": PROBE}}}
        called = [{**question, "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        forms = [
            form._replace(null_content=null, json_arguments=as_json)
            for null in (False, True)
            for as_json in (False, True)
        ]
        return next((form for form in forms if self._writes(form, called)), form)

    def _writes(self, form: Form, messages: Messages) -> bool:
        """Whether the template writes the probe in these messages in this form."""
        self._form = form
        try:
            return PROBE in self._text(messages, {}, False)[0]
        except DataError:
            raise
        except ValueError:
            return False
