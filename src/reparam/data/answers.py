"""Find the characters of a rendered chat that carry loss: each answer and the token that ends it.

The answer in message i is what

    render(messages[:i + 1])    adds to    render(messages[:i], add_generation_prompt=True)

so it includes reasoning, tool calls and everything else that the template writes for it. No content is searched for in
the text, because the same words may stand elsewhere. `{% generation %}` of a template says more precisely which parts
of the answer the model writes; it is used where it exists.

If an answer is rendered otherwise once messages follow it (for example, without its reasoning), the chat becomes one
text for each answer, which ends with this answer: the model learns each one as it must write it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from reparam.data.messages import Messages
from reparam.errors import DataError

Span = tuple[int, int]

PROBE = "QZXJQ"  # a content that no template contains
OTHER_PROBE = "0KVWK"  # one without a common prefix

SPLIT = (
    "the chat template renders an earlier answer in another way once messages follow it (such as without its "
    "reasoning), so the chat is split: one example for each answer, as it is generated"
)
END_ADDED = (
    "the {% generation %} part of the chat template leaves out the token that ends a turn; it carries loss anyway"
)
OPENS = (
    "generation begins an answer with {!r}, which the answers of this data do not begin with, so the model learns to "
    "answer in another way; a variable of the chat template, such as enable_thinking, may change what it begins with"
)
NO_END = "the chat template puts no special token after an answer, so the model does not learn where to stop"


class Render(Protocol):
    """Renders messages: the text, and the ranges of it inside `{% generation %}`."""

    def __call__(self, messages: Messages, *, generation_prompt: bool = False) -> tuple[str, list[Span]]:
        """Raises ValueError if the template refuses the messages."""


class Rendered(NamedTuple):
    """A chat, or the part of it up to one of its answers, as text."""

    text: str
    spans: list[Span]
    """Character ranges [start, end) of `text` that carry loss, ascending."""
    warnings: tuple[str, ...] = ()
    """The same text for all chats with the same problem."""


class _Answer(NamedTuple):
    """One answer, in the text of the chat that ends with it."""

    upto: str
    spans: list[Span]
    body: int
    """Where the tokens that end the answer begin; the length of the text without white space if there are none."""
    warnings: tuple[str, ...]


class Answers:
    """Finds answers in chats that `render` renders. `specials` matches the special tokens of the tokenizer."""

    def __init__(self, render: Render, specials: re.Pattern[str], *, marked: bool) -> None:
        self._render = render
        self._specials = specials
        self._marked = marked

    def find(self, messages: Messages, wanted: Sequence[int]) -> list[Rendered]:
        """The chat as one text, or as one text for each of the `wanted` answers, which are indices of messages."""
        text = self._render(messages)[0]
        answers = [self._answer(messages[: i + 1]) for i in wanted]
        if answers and answers[-1].upto.startswith(text):  # it ends with a token that only a next message would bring
            text = answers[-1].upto
        placed = [self._placed(answer, text) for answer in answers]
        if any(spans is None for spans in placed):
            return [Rendered(a.upto, a.spans, (*a.warnings, SPLIT)) for a in answers]
        warnings = tuple(dict.fromkeys(warning for answer in answers for warning in answer.warnings))
        return [Rendered(text, [span for spans in placed for span in spans or ()], warnings)]

    def _answer(self, messages: Messages) -> _Answer:
        """The last of the messages."""
        upto, marks = self._render(messages)
        start, warning = self._start(messages, upto)
        warnings = (warning,) if warning else ()
        if self._marked:
            return self._by_marks(upto, [mark for mark in _joined(marks) if mark[1] >= start], warnings)
        body, end = self._tail(messages, upto, start)
        if end is None and (closing := self.closing(messages, upto)):
            upto, end = upto + closing, len(upto) + len(closing)
        if end is None:
            return _Answer(upto, [(start, len(upto))], body, (*warnings, NO_END))
        return _Answer(upto, [(start, end)], body, warnings)

    def _start(self, messages: Messages, upto: str) -> tuple[int, str]:
        """Where the last message begins in `upto`, and a warning if it does not continue the generation prompt."""
        before = text_or_none(self._render, messages[:-1], generation_prompt=True)
        if before is not None and upto.startswith(before):
            return len(before), ""
        # The content of the answer begins where the texts with two other contents differ.
        others = [
            text_or_none(self._render, [*messages[:-1], {"role": messages[-1]["role"], "content": probe}]) or ""
            for probe in (PROBE, OTHER_PROBE)
        ]
        header = min(common(*others), common(others[0], upto))
        history = text_or_none(self._render, messages[:-1])
        if before is None or history is None or not before.startswith(history):
            return header, ""
        prompt = before[len(history) :]
        found = self._specials.search(prompt) or re.search(r"\S+", prompt)
        # Not in an earlier message: some templates put no such prompt before a tool call.
        at = upto.rfind(prompt[: found.end()], common(history, upto), header) if found else -1
        if at < 0:
            return header, ""
        kept = common(prompt, upto[at:header])  # the part of the generation prompt that the answer continues
        return at + kept, OPENS.format(prompt[kept:]) if kept < len(prompt) else ""

    def _tail(self, messages: Messages, upto: str, start: int) -> tuple[int, int | None]:
        """Where the special tokens at the end of `upto` begin, and where those that end the answer end, or None."""
        matches = list(self._specials.finditer(upto, start))
        tail: list[Span] = []
        begin = len(upto)
        while matches and not upto[matches[-1].end() : begin].strip():
            tail.insert(0, matches.pop().span())
            begin = tail[0][0]
        if not tail:
            return len(upto.rstrip()), None
        if tail[-1][1] - begin == sum(end - first for first, end in tail):  # nothing stands between them
            return begin, tail[-1][1]
        # Some templates end a text with one more token, which is not there if a message follows.
        following = text_or_none(self._render, [*messages, {"role": "user", "content": PROBE}])
        kept = len(upto) if following is None else common(upto, following)
        return begin, max([end for _, end in tail if end <= kept], default=tail[-1][1])

    def closing(self, messages: Messages, upto: str) -> str:
        """The special token with which a next message continues `upto` directly; "" if there is none.

        Some templates end no answer: the first token of the next message is what the model generates to stop.
        """
        if upto != upto.rstrip():
            return ""
        *before, last = messages
        calls = {"tool_calls": last["tool_calls"]} if last.get("tool_calls") else {}
        plain = {"role": last["role"], "content": "" if calls else OTHER_PROBE, **calls}  # it has no reasoning
        following = {"role": "tool" if calls else "user", "content": PROBE}
        # Once the next message follows, the template may drop the reasoning of earlier ones.
        for earlier in (before, [{"role": "user", "content": PROBE}]):
            alone = text_or_none(self._render, [*earlier, plain])
            longer = text_or_none(self._render, [*earlier, plain, following])
            if alone is not None and longer is not None and longer.startswith(alone):
                found = self._specials.match(longer, len(alone))
                return found.group() if found else ""
        return ""

    def _by_marks(self, upto: str, marks: Sequence[Span], warnings: tuple[str, ...]) -> _Answer:
        """The ranges that the template marks; the last one is extended by the special token that ends the turn."""
        if not marks:
            return _Answer(upto, [], len(upto.rstrip()), warnings)
        spans = list(marks)
        start, end = spans[-1]
        inside = [match.span() for match in self._specials.finditer(upto, start, end)]
        if inside and not upto[inside[-1][1] : end].strip():
            return _Answer(upto, spans, inside[-1][0], warnings)
        if following := self._specials.match(upto, end):
            spans[-1] = (start, following.end())
            return _Answer(upto, spans, end, (*warnings, END_ADDED))
        return _Answer(upto, spans, len(upto[:end].rstrip()), (*warnings, NO_END))

    def _placed(self, answer: _Answer, text: str) -> list[Span] | None:
        """The ranges of the answer in the text of the whole chat; None if it is rendered in another way there."""
        if not answer.spans:
            return []
        *spans, (start, end) = answer.spans
        if text.startswith(answer.upto[:end]):
            return answer.spans
        if not text.startswith(answer.upto[: answer.body]):
            return None
        other = answer.body  # another token may end an answer that is not the last
        for _ in self._specials.finditer(answer.upto, answer.body, end):
            if following := self._specials.match(text, other):
                other = following.end()
        if other > answer.body:
            return [*spans, (start, other)]
        return [*spans, (start, common(answer.upto, text))] if NO_END in answer.warnings else None


def text_or_none(render: Render, messages: Messages, *, generation_prompt: bool = False) -> str | None:
    """The rendered text, or None if the template refuses the messages."""
    try:
        return render(messages, generation_prompt=generation_prompt)[0]
    except DataError:
        raise
    except ValueError:
        return None


def common(a: str, b: str) -> int:
    """Length of the common prefix in characters."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices compare much faster than characters
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Merge ranges that follow each other without a gap."""
    result: list[Span] = []
    for start, end in spans:
        if result and result[-1][1] == start:
            start = result.pop()[0]
        result.append((start, end))
    return result
