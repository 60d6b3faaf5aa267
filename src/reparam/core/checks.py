"""Checks of setting values: finite numbers, whole numbers, comma-separated numbers, and one of several words."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeGuard


def finite(value: object) -> TypeGuard[int | float]:
    """Whether `value` is an int or float that is finite; a bool is not a number.

    >>> finite(0.5), finite(True), finite(float("nan"))
    (True, False, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def whole(value: object, least: int) -> TypeGuard[int]:
    """Whether `value` is an int of at least `least`; a bool is not a number.

    >>> whole(2, 1), whole(0, 1), whole(True, 1), whole(2.0, 1)
    (True, False, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def wrong_words(settings: object, choices: Mapping[str, Iterable[str]]) -> list[str]:
    """One message for each of these fields of `settings` whose value is not one of its choices.

    >>> from types import SimpleNamespace
    >>> wrong_words(SimpleNamespace(mode="dad"), {"mode": ("did", "said")})
    ["mode='dad': expected one of did, said"]
    """
    return [
        f"{field}={value!r}: expected one of {', '.join(known)}"
        for field, known in choices.items()
        if (value := getattr(settings, field)) not in known
    ]


def numbers(text: str, what: str) -> tuple[float, ...]:
    """Parse comma-separated numbers. Raises ValueError for anything else; `what` names the option in the message.

    >>> numbers("0.5, -1", "--weights")
    (0.5, -1.0)
    """
    found = []
    for part in text.split(","):
        try:
            found.append(float(part))
        except ValueError:
            raise ValueError(
                f"{what} {text!r}: {part.strip()!r} is not a number; expected comma-separated numbers"
            ) from None
    return tuple(found)


def nearest(name: str, known: Iterable[str]) -> str:
    """The text " (did you mean 'x'?)" with up to three of the closest known names, or "" if none is close."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f" (did you mean {' or '.join(repr(c) for c in close)}?)" if close else ""


def listed(problems: Sequence[str], *, shown: int = 5) -> str:
    """Join the first `shown` problems with "; ", and add the number of the others."""
    more = len(problems) - shown
    return "; ".join(problems[:shown]) + (f"; and {more} more" if more > 0 else "")
