"""The ranges of the values in a configuration."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from reparam.core.checks import finite, whole
from reparam.core.plain import wrong_types
from reparam.errors import ConfigError


def check(settings: object, section: str, **rules: tuple[str, Callable[[Any], bool]]) -> None:
    """Raise ConfigError that names every key of a wrong type, and every key whose rule is not met.

    A rule is the expected range and a function that tells whether the value is in it.
    """
    if problems := wrong_types(settings):
        raise ConfigError("; ".join(f"{section}.{problem}" for problem in problems))
    wrong = [
        f"{section}.{key}: {getattr(settings, key)!r}: expected {text}"
        for key, (text, right) in rules.items()
        if not right(getattr(settings, key))
    ]
    if wrong:
        raise ConfigError("; ".join(wrong))


Rule = tuple[str, Callable[[Any], bool]]
ABOVE: Rule = ("a finite number above 0", lambda value: finite(value) and value > 0)
LEAST: Rule = ("a finite number of at least 0", lambda value: finite(value) and value >= 0)


def count(least: int) -> Rule:
    """The rule of a whole number."""
    return f"a whole number of at least {least}", lambda value: whole(value, least)


_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def bytes_of(key: str, value: int | str) -> int:
    """Parse a number of bytes in a configuration: an integer, or text with a unit. Raises ConfigError otherwise.

    >>> bytes_of("optim.budget", "64MiB"), bytes_of("optim.budget", 4096), bytes_of("optim.budget", "4096")
    (67108864, 4096, 4096)
    """
    match = re.fullmatch(r"(\d+) ?(|KiB|MiB|GiB)", str(value).strip())
    if match is None:
        raise ConfigError(f"{key}: {value!r} is not a number of bytes; write 67108864, 65536KiB, 64MiB or 1GiB")
    return int(match[1]) * _UNITS[match[2]]
