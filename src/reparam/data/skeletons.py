"""Render many plain chats at once.

A chat is plain if its messages have only a role and a content, which is not empty and holds no special token. Most
templates write such chats as fixed text around the contents. This fixed text, and where the answers begin and end in
it, is found once for each sequence of roles, from a chat with other contents. Then each chat is rendered once, and
compared with the fixed text around its contents, by their SHA-256: the process that renders need not send the text. If
they differ, the chat is rendered as any other, in several calls.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from reparam.data.answers import PROBE, Rendered
from reparam.data.messages import Messages
from reparam.errors import DataError

AT_ONCE = 64  # chats in a request to the process that renders


class _Skeleton(NamedTuple):
    """How the template writes chats with one sequence of roles."""

    fixed: list[str]
    """The text before each content, and the text behind the last one."""
    ends: list[tuple[int, int, int, int]]
    """For each range with loss: the contents before its start, its start, the contents before its end, its end. The
    places are those in a text without contents."""

    def text(self, messages: Messages) -> str:
        """The text of a chat."""
        pairs = zip(self.fixed, messages, strict=False)  # one more fixed text stands at the end
        parts = [part for fixed, message in pairs for part in (fixed, message["content"])]
        return "".join([*parts, self.fixed[-1]])

    def spans(self, messages: Messages) -> list[tuple[int, int]]:
        """The character ranges of the text that carry loss."""
        before = [0]
        for message in messages:
            before.append(before[-1] + len(message["content"]))
        return [(start + before[i], end + before[j]) for i, start, j, end in self.ends]


class Skeletons:
    """Renders plain chats. `render` renders one chat in full; `digests` gives the SHA-256 of several texts, or None."""

    def __init__(
        self,
        render: Callable[[Messages], list[Rendered]],
        digests: Callable[[Sequence[Messages]], Sequence[str | None]],
        specials: re.Pattern[str],
        begin_special: Collection[str],
    ) -> None:
        self._render, self._digests = render, digests
        self._specials, self._begin_special = specials, begin_special
        self._known: dict[tuple[str, ...], _Skeleton | None] = {}

    def __call__(self, chats: Sequence[Messages]) -> dict[int, list[Rendered]]:
        """The plain chats that the template writes as expected, by their number, each as one text."""
        plain = {i: found for i, chat in enumerate(chats) if (found := self._skeleton(chat)) is not None}
        numbers, rendered = list(plain), {}
        for start in range(0, len(numbers), AT_ONCE):
            some = numbers[start : start + AT_ONCE]
            for i, digest in zip(some, self._digests([chats[i] for i in some]), strict=True):
                text = plain[i].text(chats[i])
                if digest == hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest():
                    rendered[i] = [Rendered(text, plain[i].spans(chats[i]))]
        return rendered

    def _skeleton(self, chat: Messages) -> _Skeleton | None:
        """How the template writes a chat like this; None if it is not plain, or if that cannot be told."""
        if any(len(m) != 2 or not m["content"] or self._is_special(m["content"]) for m in chat):
            return None
        roles = tuple(message["role"] for message in chat)
        if roles not in self._known:
            self._known[roles] = self._found(roles)
        return self._known[roles]

    def _is_special(self, content: str) -> bool:
        return any(first in content for first in self._begin_special) and bool(self._specials.search(content))

    def _found(self, roles: Sequence[str]) -> _Skeleton | None:
        probes = [f"{PROBE}{number:05}" for number in range(len(roles))]
        chat: list[Mapping[str, Any]] = [{"role": r, "content": p} for r, p in zip(roles, probes, strict=True)]
        try:
            rendered = self._render(chat)
        except DataError:
            raise
        except ValueError:
            return None
        if len(rendered) > 1 or rendered[0].warnings:
            return None
        text, spans, _ = rendered[0]
        if text.count(PROBE) != len(probes):
            return None
        fixed = re.split(f"({PROBE}\\d{{5}})", text)
        if fixed[1::2] != probes:
            return None
        size = len(PROBE) + 5
        places = [found.start() for found in re.finditer(PROBE, text)]

        def without(place: int) -> tuple[int, int]:
            before = sum(start + size <= place for start in places)
            return before, place - before * size

        if any(start < place < start + size for span in spans for place in span for start in places):
            return None
        return _Skeleton(fixed[::2], [(*without(start), *without(end)) for start, end in spans])
