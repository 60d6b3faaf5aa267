"""What a setting may be: a number, which True is not, several with commas between them, or one of several words."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import TypeGuard


def finite(value: object) -> TypeGuard[int | float]:
    """Whether it is a number other than NaN and infinity.

    >>> finite(0.5), finite(True), finite(float("nan"))
    (True, False, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def whole(value: object, least: int) -> TypeGuard[int]:
    """Whether it is a whole number of at least `least`.

    >>> whole(2, 1), whole(0, 1), whole(True, 1), whole(2.0, 1)
    (True, False, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def wrong_words(settings: object, choices: Mapping[str, Iterable[str]]) -> list[str]:
    """A sentence for each of these fields of `settings` that is none of its words.

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
    """Numbers with commas between them. Raises ValueError for anything else, which `what` is the name of.

    >>> numbers("0.5, -1", "--weights")
    (0.5, -1.0)
    """
    found = []
    for part in text.split(","):
        try:
            found.append(float(part))
        except ValueError:
            raise ValueError(
                f"{what} {text!r}: {part.strip()!r} is no number; expected numbers with commas between them"
            ) from None
    return tuple(found)


def nearest(name: str, known: Iterable[str]) -> str:
    """ ", did you mean 'x'?" with the closest of the known names, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f" (did you mean {' or '.join(repr(c) for c in close)}?)" if close else ""
