"""Search for d90: the smallest number of dimensions that reaches a given share of full fine-tuning's metric.

The caller supplies the training runs; this module chooses the dimensions d and interprets the results. It first tries a
grid of d with equal ratios. Then it bisects, on a logarithmic scale, between the smallest d that passes and the largest
d below it, which fails. d90 is an upper bound on the intrinsic dimension: other maps, learning rates or longer training
may need fewer dimensions. The measure is that of Li et al. 2018 (arXiv 1804.08838).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True)
class Point:
    """The results of the training runs with d dimensions."""

    d: int
    rate: float
    """The learning rate that was best for the first map."""
    values: tuple[float | None, ...]
    """The metric for each map at this rate; None for a run that failed."""

    @property
    def mean(self) -> float:
        """Mean of the metric over the maps; minus infinity if a run failed."""
        found = [value for value in self.values if value is not None]
        return statistics.mean(found) if len(found) == len(self.values) and found else -math.inf


@dataclasses.dataclass(frozen=True)
class Curve:
    """All measured points and the reference metrics."""

    base: float
    """The metric of the base model, or that of random guessing if it is higher."""
    full: float
    """The metric of full fine-tuning."""
    share: float
    """Share of `full` that d90 reaches, in (0, 1]."""
    points: tuple[Point, ...]
    """The points in ascending order of d."""

    @property
    def threshold(self) -> float:
        """The metric that a point must reach to pass, share · full."""
        return self.share * self.full

    @property
    def d90(self) -> int | None:
        """The smallest d that passes; None if none does."""
        return next((point.d for point in self.points if self.passes(point)), None)

    @property
    def odd(self) -> tuple[int, ...]:
        """Every d above d90 that fails. If there are any, d90 partly depends on chance."""
        return tuple(p.d for p in self.points if self.d90 is not None and p.d > self.d90 and not self.passes(p))

    @property
    def below(self) -> int | None:
        """The largest measured d below d90; None if there is none."""
        return max((p.d for p in self.points if self.d90 is not None and p.d < self.d90), default=None)

    def passes(self, point: Point) -> bool:
        """Whether the mean over the point's maps reaches the threshold."""
        return point.mean >= self.threshold


def grid(text: str, each: int = 2) -> tuple[int, ...]:
    """Parse a range such as "10:10000" into dimensions with equal ratios, `each` per factor of ten, with both ends.

    Raises ValueError unless `text` is two whole numbers of at least 1, separated by a colon, in ascending order.

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
    """Raise ValueError if full fine-tuning's metric cannot serve as a reference.

    That is the case if it is not finite or not above 0, or if the base (or random guessing) already reaches `share` of
    it without training.
    """
    if not (math.isfinite(full) and math.isfinite(base)):
        raise ValueError(
            f"the metric is {full} after full fine-tuning and {base} before, but both must be finite; try lower "
            f"--full-rates"
        )
    if full <= 0:
        raise ValueError(
            f"the metric of full fine-tuning is {full:.4g}, but must be above 0; train longer, try other --full-rates, "
            f"or choose --metric saved, which needs no right answers"
        )
    if base >= share * full:
        raise ValueError(
            f"without training the metric is already {base:.4g}, and the threshold is {share:g} x {full:.4g} = "
            f"{share * full:.4g}, so no dimension would fail; choose --metric saved, a harder task, or a longer "
            f"reference run"
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
    """Evaluate all sizes, then bisect between d90 and the largest failing d until their ratio is at most `tolerance`.

    Raises the errors of `check_reference`, and ValueError if `tolerance` is not above 1.

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
    """The lowest rank at which LoRA has at least d parameters; `sides` is Σ (I + O), its parameters per rank.

    >>> lora_rank(1000, 600), lora_rank(10, 600)
    (2, 1)
    """
    return max(1, math.ceil(d / sides))
