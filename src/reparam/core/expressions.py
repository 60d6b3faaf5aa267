"""Match regular expressions from files in a time that no expression can blow up.

Python's `re` tries all ways to match one after the other; for `(\\w+\\.?)+!` their number doubles with each character.
Here the set of all positions that a part of the expression can end at is computed at once, as the bits of an integer
(Thompson 1968, CACM 11(6)): the answer is that of `re`, and each part costs at most about as many steps as the text has
characters. Only whether and where an expression matches is told, not its groups.
"""

from __future__ import annotations

import functools
import re
from re import _compiler, _constants, _parser  # type: ignore[attr-defined]
from typing import Any

LONGEST = 1 << 20  # characters of an expression
_CHARACTERS = (_constants.LITERAL, _constants.NOT_LITERAL, _constants.ANY, _constants.IN)
_REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT)
_ASSERTIONS = (_constants.ASSERT, _constants.ASSERT_NOT)


class Expression:
    """A regular expression, matched from the start of a text.

    Raises ValueError if it is invalid or too long, and for back-references, conditions, atomic groups and possessive
    quantifiers, which need the order in which `re` tries things.

    >>> Expression(r"(\\w+\\.?)+!").fullmatch("a" * 1000)
    False
    >>> Expression(r".*\\.(q|v)_proj").fullmatch("layers.0.q_proj")
    True
    """

    def __init__(self, pattern: str) -> None:
        if len(pattern) > LONGEST:
            raise ValueError(f"{pattern[:40]!r}... is longer than {LONGEST:,} characters")
        try:
            self._tree = _parser.parse(pattern)
            _check(self._tree, pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{pattern[:200]!r} is not a valid regular expression: {error}") from None
        operations = list(self._tree)
        literal = all(op is _constants.LITERAL for op, _ in operations) and not self._tree.state.flags & re.IGNORECASE
        self.literal: str | None = "".join(chr(value) for _, value in operations) if literal else None
        """The only text that matches as a whole, or None if there may be others."""

    def fullmatch(self, text: str) -> bool:
        """Whether the whole text matches, as `re.fullmatch` tells."""
        if self.literal is not None:
            return text == self.literal
        return bool(self.ends(text) >> len(text))

    def match(self, text: str) -> bool:
        """Whether a start of the text matches, as `re.match` tells."""
        return bool(self.ends(text))

    def ends(self, text: str) -> int:
        """The positions at which a match that starts at 0 can end, as the bits of an integer."""
        return _Matching(text, self._tree.state.flags).sequence(self._tree, 1)


expression = functools.lru_cache(maxsize=4096)(Expression)
"""`Expression`, remembered by its text."""


class _Matching:
    """The matching of one text: sets of positions (bits) go through the parts of an expression."""

    def __init__(self, text: str, flags: int) -> None:
        self.text = text
        self.flags = flags

    def sequence(self, parts: Any, at: int) -> int:
        """The positions after all parts, from the positions `at`."""
        for op, value in parts:
            if not at:
                break
            at = self.part(op, value, at)
        return at

    def part(self, op: Any, value: Any, at: int) -> int:
        """The positions after one part."""
        if op in _CHARACTERS:
            return (at & self.where(op, value)) << 1
        if op is _constants.AT:
            return at & self.where(op, value)
        if op is _constants.BRANCH:
            found = 0
            for branch in value[1]:
                found |= self.sequence(branch, at)
            return found
        if op is _constants.SUBPATTERN:
            before, (_, added, removed, inner) = self.flags, value
            self.flags = (before | added) & ~removed
            found = self.sequence(inner, at)
            self.flags = before
            return found
        if op in _REPEATS:
            least, most, inner = value
            return self.repeat(least, most, inner, at)
        assert op in _ASSERTIONS
        direction, inner = value
        back = inner.getwidth()[0] if direction < 0 else 0
        kept = 0
        for place in range(back, len(self.text) + 1):
            if at >> place & 1:
                ends = self.sequence(inner, 1 << (place - back))
                holds = bool(ends >> place & 1 if direction < 0 else ends)
                kept |= (holds is (op is _constants.ASSERT)) << place
        if op is _constants.ASSERT_NOT:
            kept |= at & ((1 << back) - 1)  # nothing is before the first characters
        return kept

    def repeat(self, least: int, most: int, inner: Any, at: int) -> int:
        """The positions after `least` to `most` times the part. After as many rounds as positions, nothing is new."""
        rounds = len(self.text) + 1
        for _ in range(min(least, rounds)):
            at = self.sequence(inner, at)
            if not at:
                return 0
        found = new = at
        for _ in range(min(most - least, rounds)):
            new = self.sequence(inner, new) & ~found
            if not new:
                break
            found |= new
        return found

    def where(self, op: Any, value: Any) -> int:
        """The positions at which one character, or an assertion without width, matches."""
        one = _compiled(op, tuple(value) if isinstance(value, list) else value, int(self.flags))
        return _positions(one, self.text)


@functools.lru_cache(maxsize=4096)
def _positions(one: re.Pattern[str], text: str) -> int:
    return sum(1 << place for place in range(len(text) + 1) if one.match(text, place))


@functools.lru_cache(maxsize=4096)
def _compiled(op: Any, value: Any, flags: int) -> re.Pattern[str]:
    """A single part as an expression of `re`."""
    content = list(value) if isinstance(value, tuple) else value
    found: re.Pattern[str] = _compiler.compile(_parser.SubPattern(_parser.State(), [(op, content)]), flags)
    return found


def _check(parts: Any, pattern: str) -> None:
    """Raise ValueError for a part of an expression whose result depends on the order of attempts."""
    for op, value in parts:
        if op is _constants.BRANCH:
            for branch in value[1]:
                _check(branch, pattern)
        elif op is _constants.SUBPATTERN:
            _check(value[3], pattern)
        elif op in _REPEATS:
            _check(value[2], pattern)
        elif op in _ASSERTIONS:
            _check(value[1], pattern)
        elif op not in _CHARACTERS and op is not _constants.AT:
            raise ValueError(f"{pattern[:200]!r} uses {str(op).lower()}, which is not supported here")
