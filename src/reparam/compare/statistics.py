"""Means with Student's 95 % intervals, and differences that are paired by seed.

An interval says how far a mean over seeds can be trusted: a seed draws the adapter's start and the order of the rows.
The rows that are scored are the same for all, so that their choice is no part of it. No correction is made for the
number of intervals in a table.
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
    """A mean and its 95 % interval; the ends are None where one value says nothing of the spread."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def half(self) -> float | None:
        """Half the interval's length."""
        return None if self.high is None else self.high - self.mean

    @property
    def holds_zero(self) -> bool:
        """Whether 0 is in it; an interval that is not known may hold anything."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high


def student(freedom: int) -> float:
    """Student's t at 0.975; above 30 degrees of freedom by Fisher's expansion, which is right to four digits.

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
    """The mean of some values, one for each seed, and its interval. Raises ValueError for none.

    >>> interval([1.0, 2.0, 3.0])
    Interval(mean=2.0, low=-0.4841..., high=4.4841..., count=3)
    """
    if not values:
        raise ValueError("there is no mean of no values")
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Interval(mean, None, None, 1)
    half = student(count - 1) * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def paired(values: Mapping[int, float], others: Mapping[int, float]) -> Interval | None:
    """The mean of the differences `values` less `others`, seed by seed; None where they have no seed in common.

    >>> paired({0: 1.0, 1: 2.0}, {1: 1.5, 2: 9.0}).mean
    0.5
    """
    common = [seed for seed in values if seed in others]
    return interval([values[seed] - others[seed] for seed in common]) if common else None
