"""What counts as a number in a setting: True is none."""

from __future__ import annotations

import math
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
