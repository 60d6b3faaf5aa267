"""Looking for d90: the smallest number of dimensions that reaches a share of full fine-tuning's metric.

What a run is, the caller knows; here are the order in which d is tried, and what the outcome means. Sizes d go over a
grid of equal ratios, then by halving (of the logarithm) between the largest d that fails below the smallest that
passes. d90 is an upper bound on the intrinsic dimension: another map, rate or length of training may need less.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True)
class Point:
    """What d dimensions reached."""

    d: int
    rate: float
    """The learning rate that was best for the first map."""
    values: tuple[float | None, ...]
    """The metric for each map at this rate; None for a run that failed."""

    @property
    def mean(self) -> float:
        """Over the maps; minus infinity where a run failed."""
        found = [value for value in self.values if value is not None]
        return statistics.mean(found) if len(found) == len(self.values) and found else -math.inf


@dataclasses.dataclass(frozen=True)
class Curve:
    """All points by d, and what they say."""

    base: float
    """The metric of the base model, or of guessing where that is higher."""
    full: float
    """The metric of full fine-tuning."""
    share: float
    points: tuple[Point, ...]

    @property
    def threshold(self) -> float:
        """What has to be reached."""
        return self.share * self.full

    @property
    def d90(self) -> int | None:
        """The smallest d that passes, or None: not reached."""
        return next((point.d for point in self.points if self.passes(point)), None)

    @property
    def odd(self) -> tuple[int, ...]:
        """Every d above that fails all the same: where there are some, d90 owes something to chance."""
        return tuple(p.d for p in self.points if self.d90 is not None and p.d > self.d90 and not self.passes(p))

    @property
    def below(self) -> int | None:
        """The largest d below d90 that was tried."""
        return max((p.d for p in self.points if self.d90 is not None and p.d < self.d90), default=None)

    def passes(self, point: Point) -> bool:
        """Whether a point reaches the threshold, on average over its maps."""
        return point.mean >= self.threshold


def grid(text: str, each: int = 2) -> tuple[int, ...]:
    """Sizes from "10:10000", `each` of them for every factor of ten, both ends among them.

    Raises ValueError for anything but two whole numbers from 1 on, the lower first.

    >>> grid("10:1000")
    (10, 32, 100, 316, 1000)
    """
    parts = text.split(":")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"grid {text!r}: expected two whole numbers, as in 10:10000")
    low, high = (int(part) for part in parts)
    if not 1 <= low < high or each < 1:
        raise ValueError(f"grid {text!r}: expected a lower number of at least 1, and a higher one")
    steps = max(1, round(each * math.log10(high / low)))
    return tuple(sorted({round(low * (high / low) ** (k / steps)) for k in range(steps + 1)}))


def check_reference(base: float, full: float, share: float) -> None:
    """Raise ValueError where a share of the metric of full fine-tuning means nothing.

    That is where it is no number or not above 0, or where the base, or guessing, has that much without training.
    """
    if not (math.isfinite(full) and math.isfinite(base)):
        raise ValueError(f"the metric is {full} after full fine-tuning and {base} before; there is nothing to compare")
    if full <= 0:
        raise ValueError(
            f"full fine-tuning reached {full:.4g}, and a share of that is no threshold: train longer, try other "
            f"--full-rates, or choose --metric saved, which needs no right answers"
        )
    if base >= share * full:
        raise ValueError(
            f"without training the metric is {base:.4g} already, and the threshold is {share:g} x {full:.4g} = "
            f"{share * full:.4g}: no dimension would fail. Choose --metric saved, a harder task, or a longer reference"
        )


def search_dimension(
    evaluate: Callable[[int], Point],
    *,
    base: float,
    full: float,
    sizes: Sequence[int],
    share: float = 0.9,
    tolerance: float = 1.25,
) -> Curve:
    """Try all sizes, then halve between the last that fails and the first that passes until their ratio is small.

    Raises ValueError as `check_reference` does, and for a tolerance that is not above 1.

    >>> curve = search_dimension(lambda d: Point(d, 0.1, (min(d / 100, 1.0),)), base=0.0, full=1.0, sizes=(10, 1000))
    >>> curve.d90, curve.below
    (100, 87)
    """
    check_reference(base, full, share)
    if not tolerance > 1:
        raise ValueError(f"tolerance {tolerance!r}: expected a ratio above 1")
    points = {d: evaluate(d) for d in sorted(set(sizes))}

    def curve() -> Curve:
        return Curve(base, full, share, tuple(points[d] for d in sorted(points)))

    while True:
        now = curve()
        if now.d90 is None or now.below is None:
            return now
        middle = round(math.sqrt(now.d90 * now.below))
        if now.d90 / now.below <= tolerance or middle in points:
            return now
        points[middle] = evaluate(middle)


def lora_rank(d: int, sides: int) -> int:
    """The least rank at which LoRA has d numbers, for sites whose sides sum up to `sides`, Σ (I + O).

    >>> lora_rank(1000, 600), lora_rank(10, 600)
    (2, 1)
    """
    return max(1, math.ceil(d / sides))
