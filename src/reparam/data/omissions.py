"""What a chat template leaves out: messages with a role that it ignores, part of an answer, tool calls, other keys.

Templates drop such things without a word. The first three are errors here; keys that change nothing are listed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reparam.data.answers import PROBE, Render, Rendered, text_or_none
from reparam.data.forms import reasoning_of
from reparam.data.messages import FLAGS, Messages

READ = ("role", "content", "tool_calls", "tool_call_id", *FLAGS)  # keys whose use is not asked about
TRIES = 50  # messages of a batch in which a key must change nothing before it counts as not used there


class Omissions:
    """Finds what the template leaves out of chats, with caches by the form of a chat.

    `renderer` makes the function that renders a chat with further variables of the template.
    """

    def __init__(self, renderer: Callable[[Mapping[str, Any]], Render]) -> None:
        self._renderer = renderer
        self._ignored: dict[object, int | None] = {}
        self._dropped: dict[object, bool] = {}
        self._unused: dict[str, int] = {}  # messages and chats in which a key changed nothing; -1 once it did

    def check(
        self, messages: Messages, parts: Sequence[Rendered], render: Render, variables: Mapping[str, Any]
    ) -> None:
        """Raise ValueError if a message, part of an answer or a tool call is missing from the texts of a chat."""
        texts = [_squashed(part.text) for part in parts]
        for number, message in enumerate(messages, start=1):
            content = _squashed(message["content"])
            # An answer without loss may stand behind the last one that is learned, in none of the parts.
            if content and not any(content in text for text in texts) and content not in _squashed(render(messages)[0]):
                probe = [*messages[: number - 1], {**message, "content": PROBE}, *messages[number:]]
                if PROBE not in render(probe)[0]:
                    raise ValueError(_ignored(number, message))
                if message["role"] == "assistant":  # templates may change other contents, for example quote them
                    raise ValueError(f"the chat template changes or drops part of the answer in message {number}")
            if message.get("tool_calls"):
                self._check_calls(messages[:number], render)
        if (index := self._ignored_message(messages, render)) is not None:
            raise ValueError(_ignored(index + 1, messages[index]))
        self._try_message_keys(messages, render)
        self._try_variables(messages, render, variables)

    def uses(self) -> dict[str, bool]:
        """Whether the keys of messages and the variables that were tried changed a text, since the last call."""
        found = {key: count < 0 for key, count in self._unused.items()}
        self._unused.clear()
        return found

    def _check_calls(self, messages: Messages, render: Render) -> None:
        """Raise ValueError if the template leaves out a tool call of the last message."""
        message = messages[-1]
        calls = message["tool_calls"]
        for number in range(len(calls)):
            form = (len(calls), number, bool(message["content"]), reasoning_of(message) is None)
            if form not in self._dropped:
                others = [call for i, call in enumerate(calls) if i != number]
                without = {**message, "tool_calls": others or None}
                self._dropped[form] = _same(render, [*messages[:-1], without], messages)
            if self._dropped[form]:
                raise ValueError(
                    f"the chat template leaves out tool call {number + 1} of message {len(messages)}; use a template "
                    "that writes tool calls, or write the call into the content"
                )

    def _ignored_message(self, messages: Messages, render: Render) -> int | None:
        """Index of a message that the rendered text does not depend on, or None; cached per sequence of roles."""
        blank = [not message["content"].strip() and not message.get("tool_calls") for message in messages]
        form = tuple(zip((message["role"] for message in messages), blank, strict=True))
        if form not in self._ignored:
            whole = [i for i in range(len(messages)) if not blank[i]]  # a template may leave out empty messages
            self._ignored[form] = next(
                (i for i in whole if len(messages) > 1 and _same(render, _without(messages, i), messages)), None
            )
        return self._ignored[form]

    def _try_message_keys(self, messages: Messages, render: Render) -> None:
        """Find out which other keys of the messages change the text."""
        for i, message in enumerate(messages):
            for key in message:
                if key in READ or (key == "name" and message["role"] == "tool") or message[key] is None:
                    continue
                if self._is_open(key):
                    # Later messages may hide what the key of an answer changes.
                    end = i + 1 if message["role"] == "assistant" else len(messages)
                    changed = [*messages[:i], {k: v for k, v in message.items() if k != key}, *messages[i + 1 :]]
                    self._count(key, same=_same(render, changed[:end], messages[:end]))

    def _try_variables(self, messages: Messages, render: Render, variables: Mapping[str, Any]) -> None:
        """Find out which of the variables that `render` has change the text, or the generation prompt."""
        for key in filter(self._is_open, variables):
            without = self._renderer({k: v for k, v in variables.items() if k != key})
            texts, others = (
                [text_or_none(each, messages, generation_prompt=prompt) for prompt in (False, True)]
                for each in (render, without)
            )
            self._count(key, same=texts == others)

    def _is_open(self, key: str) -> bool:
        return 0 <= self._unused.get(key, 0) < TRIES

    def _count(self, key: str, *, same: bool) -> None:
        self._unused[key] = self._unused.get(key, 0) + 1 if same else -1


def _without(messages: Messages, index: int) -> Messages:
    return [*messages[:index], *messages[index + 1 :]]


def _same(render: Render, changed: Messages, messages: Messages) -> bool:
    """Whether the template writes the same text for both. It may refuse the changed chat."""
    return text_or_none(render, changed) == render(messages)[0]


def _squashed(text: str) -> str:
    """The text without white space, which many templates strip."""
    return "".join(text.split())


def _ignored(number: int, message: Mapping[str, Any]) -> str:
    if message.get("tool_calls"):
        return (
            f"the chat template leaves out the content of message {number}, which also has tool calls; remove the "
            "content, or use a template that writes both"
        )
    return (
        f"the chat template ignores message {number} with the role {message['role']!r}; "
        "use a role that the template knows, or move the content into another message"
    )
