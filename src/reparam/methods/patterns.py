"""Settings that differ by site: a regular expression for the end of a path -> a value; the first match counts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

_T = TypeVar("_T")


def matches(pattern: str, name: str) -> bool:
    """Whether the pattern is for the site with this path: all of it, or its end from a dot on."""
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


def first(patterns: Mapping[str, _T], name: str, default: _T) -> _T:
    """The value of the first pattern that is for this site."""
    return next((value for pattern, value in patterns.items() if matches(pattern, name)), default)


def broken(field: str, patterns: Iterable[str]) -> list[str]:
    """A sentence for each pattern that is no regular expression."""
    found = []
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            found.append(f"{field} {pattern!r} is no regular expression: {error}")
    return found


def check_used(field: str, patterns: Iterable[str], names: Iterable[str], *, method: str) -> None:
    """Raise ValueError for a pattern that is for none of the sites."""
    sites = list(names)
    for pattern in patterns:
        if not any(matches(pattern, name) for name in sites):
            raise ValueError(f"{method}: {field} {pattern!r} matches none of the {len(sites)} sites")


def exactly(values: Mapping[str, _T]) -> dict[str, _T]:
    """A pattern for each of these sites and no other of them: the longest paths first, which may end in a shorter."""
    return {re.escape(name): values[name] for name in sorted(values, key=len, reverse=True)}
