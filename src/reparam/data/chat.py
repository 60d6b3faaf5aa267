"""Render a chat with its template, and find the characters that carry loss: each answer and its end-of-turn token.

A template with `{% generation %}` marks the answers itself. With any other template, the answer in message i is what

    render(messages[:i + 1])    adds to    render(messages[:i], add_generation_prompt=True)

including the special tokens after its content. The template must be *prefix stable*: a rendered answer must not change
when messages follow, except for the token that ends it. A template that is not prefix stable (for example, one that
drops the reasoning of earlier turns) is refused, because the model would learn answers in a wrong form.

Some templates silently drop a message with an unknown role or part of a content. This file reports both as errors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from reparam.data.rendering import render
from reparam.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]

PROBE = "QZXJQ"  # a content that no template contains
REASONING = ("reasoning_content", "thinking", "reasoning")  # the keys under which messages hold it


class Rendered(NamedTuple):
    """A chat rendered as text."""

    text: str
    spans: list[Span]
    """Character ranges [start, end) of `text` that carry loss, ascending."""
    warning: str = ""
    """A warning about this chat, or "". The text is the same for all chats that have the same problem."""


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """A regular expression for the tokenizer's special tokens; longer tokens match first."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return _any_of(added | set(tokenizer.all_special_tokens))


def _any_of(tokens: Collection[str]) -> re.Pattern[str]:
    """A regular expression for the tokens that are not white space, as some added tokens are."""
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
        self._ignored: dict[tuple[tuple[str, bool], ...], int | None] = {}  # cache of `_ignored_message`

    def render(self, messages: Messages, *, loss_on: Literal["answers", "all"]) -> Rendered:
        """Render the chat as text, with the character ranges that carry loss.

        `loss_on` is "answers" (messages with the role "assistant") or "all". Raises ValueError if the template refuses
        the messages, ignores one of them, drops content, or is not prefix stable.
        """
        text, spans = self._text(messages)
        self._check_all_appear(messages, text)
        if loss_on == "all":
            return Rendered(text, [(0, len(text))])
        if self._marked:
            return self._with_end_tokens(text, spans)
        return self._by_prefix(messages, text)

    def prompt(self, messages: Messages) -> str:
        """The chat as text, up to where the next answer begins. Raises ValueError if the template refuses it."""
        return self._text(messages, generation_prompt=True)[0]

    def end_of_answer(self) -> str:
        """The added token with which the template ends the last answer of a chat; "" if there is none.

        Raises ValueError if the template refuses a chat of one question and one answer.
        """
        text = self._text([{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}])[0]
        at = text.rfind(PROBE)
        found = self._added.search(text, at + len(PROBE)) if at >= 0 else None
        return found.group() if found else ""

    def _text(self, messages: Messages, *, generation_prompt: bool = False) -> tuple[str, list[Span]]:
        """The rendered text, and the character ranges inside `{% generation %}`."""
        variables = {
            **self._variables,
            "messages": [_with_reasoning(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": generation_prompt,
        }
        return render(self._template, variables)

    # --- messages that the template ignores ---

    def _check_all_appear(self, messages: Messages, text: str) -> None:
        """Raise ValueError if a message, or part of an answer, is missing from the rendered text."""
        for number, message in enumerate(messages, start=1):
            if message["content"].strip() in text:
                continue
            probe = [*messages[: number - 1], {**message, "content": PROBE}, *messages[number:]]
            if PROBE not in self._text(probe)[0]:
                raise ValueError(_ignored(number, message))
            if message["role"] == "assistant":  # templates may change other contents, for example quote them as JSON
                raise ValueError(f"the chat template changes or drops part of the answer in message {number}")
        if (index := self._ignored_message(messages, text)) is not None:
            raise ValueError(_ignored(index + 1, messages[index]))

    def _ignored_message(self, messages: Messages, text: str) -> int | None:
        """Index of a message that the rendered text does not depend on, or None; cached per sequence of roles."""
        blank = [not message["content"].strip() for message in messages]  # a template may leave out empty messages
        form = tuple(zip((message["role"] for message in messages), blank, strict=True))
        if form not in self._ignored:
            whole = range(len(messages)) if len(messages) > 1 else ()
            self._ignored[form] = next(
                (i for i in whole if not blank[i] and self._same_without(i, messages, text)), None
            )
        return self._ignored[form]

    def _same_without(self, index: int, messages: Messages, text: str) -> bool:
        try:
            return self._text([*messages[:index], *messages[index + 1 :]])[0] == text
        except DataError:
            raise
        except ValueError:  # the template refuses the chat without this message
            return False

    # --- ranges of the answers ---

    def _with_end_tokens(self, text: str, spans: Sequence[Span]) -> Rendered:
        """The ranges that the template marks, each extended by the special token that ends the turn."""
        result: list[Span] = []
        warning = ""
        for start, end in _joined(spans):
            last = [match.end() for match in self._specials.finditer(text, start, end)][-1:]
            if last and not text[last[0] : end].strip():
                result.append((start, end))
            elif following := self._specials.match(text, end):
                result.append((start, following.end()))
                warning = END_ADDED
            else:
                result.append((start, end))
                warning = NO_END
        return Rendered(text, result, warning)

    def _by_prefix(self, messages: Messages, text: str) -> Rendered:
        """Find the ranges by rendering the messages before each answer, and the messages up to and including it."""
        spans: list[Span] = []
        warning = ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._text(messages[:i], generation_prompt=True)[0]
            upto = text if i == len(messages) - 1 else self._text(messages[: i + 1])[0]
            body = message["content"].strip()
            if not upto.startswith(before) or (at := upto.find(body, len(before))) < 0:
                raise ValueError(_unstable(f"message {i + 1} does not continue its generation prompt", before, upto))
            stop = at + len(body)
            if not text.startswith(upto[:stop]):
                raise ValueError(_unstable(f"message {i + 1} changes when others follow", upto, text))
            end = self._end_of_turn(stop, upto, text)
            spans.append((len(before), end or _common(upto, text)))
            warning = warning if end else NO_END
        return Rendered(text, spans, warning)

    def _end_of_turn(self, stop: int, upto: str, text: str) -> int | None:
        """End of the special tokens that follow the answer whose content ends at `stop`; None if there are none.

        `upto` ends with this answer. `text` may continue, and may end this answer with another token than `upto` does.
        """
        first = self._specials.search(upto, stop)
        if first is None or not text.startswith(upto[: first.start()]):
            return None
        end = first.end()
        while following := self._specials.match(
            upto, end
        ):  # for example, the end of the answer, then the end of the turn
            end = following.end()
        if text.startswith(upto[:end]):
            return end
        other = self._specials.match(text, first.start())
        return other.end() if other else None


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under each of the names that templates use, as transformers does."""
    found = next((message[key] for key in REASONING if message.get(key) is not None), None)
    return dict(message) if found is None else {"thinking": found, **message, "reasoning_content": found}


END_ADDED = (
    "the {% generation %} part of the chat template leaves out the token that ends a turn; it carries loss anyway"
)
NO_END = "the chat template puts no special token after an answer, so the model does not learn where to stop"


def _ignored(number: int, message: Mapping[str, Any]) -> str:
    return (
        f"the chat template ignores message {number} with the role {message['role']!r}; "
        "use a role that the template knows, or move the content into another message"
    )


def _unstable(why: str, expected: str, actual: str) -> str:
    """The error message for a template that is not prefix stable, with the first difference."""
    at = _common(expected, actual)
    return (
        f"the chat template is not prefix stable: {why} ({actual[at : at + 20]!r} where {expected[at : at + 20]!r} was "
        "expected). Write such rows as prompt and completion, one row per answer, use a template with "
        "{% generation %} markers, or set loss_on='all'"
    )


def _common(a: str, b: str) -> int:
    """Length of the common prefix in characters."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Merge ranges that follow each other without a gap."""
    result: list[Span] = []
    for start, end in spans:
        if result and result[-1][1] == start:
            start = result.pop()[0]
        result.append((start, end))
    return result
