"""Settings of single sites: a regular expression that matches the end of a path -> a value. The first match wins."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from reparam.core.expressions import expression
from reparam.core.text import counted

_T = TypeVar("_T")


def matches(pattern: str, name: str) -> bool:
    """Whether the pattern matches this whole path, or its end after a dot."""
    literal = expression(pattern).literal
    if literal is not None:
        return f".{name}".endswith(f".{literal}")
    return expression(rf"(.*\.)?({pattern})").fullmatch(name)


def first(patterns: Mapping[str, _T], name: str, default: _T) -> _T:
    """The value of the first pattern that matches this path, else the default."""
    return next((value for pattern, value in patterns.items() if matches(pattern, name)), default)


def broken(field: str, patterns: Iterable[str]) -> list[str]:
    """An error message for each pattern that is not a valid regular expression."""
    found = []
    for pattern in patterns:
        try:
            expression(pattern)
            expression(f"({pattern})")  # flags may be at the start only
        except ValueError as error:
            found.append(f"{field} {error}")
    return found


def check_used(field: str, patterns: Iterable[str], names: Iterable[str], *, method: str) -> None:
    """Raise ValueError for a pattern that matches none of the sites."""
    sites = list(names)
    for pattern in patterns:
        if not any(matches(pattern, name) for name in sites):
            raise ValueError(f"{method}: {field} {pattern!r} matches none of the {counted(len(sites), 'site')}")


def exactly(values: Mapping[str, _T]) -> dict[str, _T]:
    """A pattern for each path that matches no other path. Longer paths come first: one may end with a shorter one."""
    return {re.escape(name): values[name] for name in sorted(values, key=len, reverse=True)}
