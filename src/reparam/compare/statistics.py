"""Means with Student's 95 % confidence intervals, and differences that are paired by seed.

An interval covers the variation between seeds. A seed determines the adapter's initial values and the order of the
training rows. All runs score the same held-out rows, so the interval does not cover the choice of these rows. It is
not corrected for the number of intervals in a table.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

# Student's t at 0.975 for 1, 2, 3, ... degrees of freedom.
_T: tuple[float, ...] = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
_T += (2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860)
_T += (2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423)
_NORMAL = 1.959964


@dataclasses.dataclass(frozen=True)
class Interval:
    """Mean of `count` values and its 95 % interval from `low` to `high`; both ends are None for a single value."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def half(self) -> float | None:
        """Half of the interval's length; None for a single value."""
        return None if self.high is None else self.high - self.mean

    @property
    def holds_zero(self) -> bool:
        """Whether the interval contains 0; True if its ends are not known."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high


def student(freedom: int) -> float:
    """The 0.975 quantile of Student's t distribution, to four digits; Fisher's expansion above 30 degrees of freedom.

    Raises ValueError for fewer than 1 degree of freedom.

    >>> student(2), round(student(60), 4)
    (4.3027, 2.0003)
    """
    if freedom < 1:
        raise ValueError(f"freedom={freedom}: at least 1 degree of freedom is needed")
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = _NORMAL
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval of values, one for each seed. Raises ValueError if there are no values.

    >>> interval([1.0, 2.0, 3.0])
    Interval(mean=2.0, low=-0.4841..., high=4.4841..., count=3)
    """
    if not values:
        raise ValueError("values: there are no values to take the mean of; give at least one")
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Interval(mean, None, None, 1)
    half = student(count - 1) * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def paired(values: Mapping[int, float], others: Mapping[int, float]) -> Interval | None:
    """Mean and 95 % interval of `values[seed] - others[seed]` over the seeds that both have; None if there are none.

    >>> paired({0: 1.0, 1: 2.0}, {1: 1.5, 2: 9.0}).mean
    0.5
    """
    common = [seed for seed in values if seed in others]
    return interval([values[seed] - others[seed] for seed in common]) if common else None
