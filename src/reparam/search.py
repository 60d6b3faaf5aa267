"""A search for a few numbers without gradients: linear models on a simplex, within a box and a budget.

After COBYLA (Powell 1994, "A direct search optimization method that models the objective by linear interpolation"),
which is what LoraHub's optimiser resolves to. n + 1 points carry a linear model; the next point minimises it within a
radius around the best one; a point takes the place of a vertex where that keeps the simplex from going flat; and the
radius is halved when the model is good and no step helps. Bounds are never crossed: they are part of each step.

Unlike COBYLA's, the first n + 1 points do not depend on each other's values, so that they are one generation: `f` gets
points [K, n] and gives K values.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_FLAT, _FAR = 0.25, 2.1
"""Powell's α and β: a vertex at least α radii from the face opposite, and at most β radii from the best one."""
_LEAST = 1e-4
"""Share of the first radius at which the search ends."""


@dataclasses.dataclass(frozen=True)
class Tried:
    """One point, and what f gave for it."""

    weights: tuple[float, ...]
    value: float
    """Infinite where f gave NaN."""


@dataclasses.dataclass(frozen=True)
class Found:
    """The best point that was tried."""

    weights: tuple[float, ...]
    value: float
    history: tuple[Tried, ...]
    """Every point in the order in which they were tried; the first is 0."""


def search(
    f: Callable[[Tensor], Sequence[float]],
    n: int,
    *,
    low: float = -1.5,
    high: float = 1.5,
    budget: int = 40,
    radius: float = 0.5,
) -> Found:
    """The best of at most `budget` points of the box [low, high]^n; it starts at 0 with steps of `radius`.

    `f` takes points [K, n] in float64 and gives a value for each; less is better. NaN counts as infinity, with one
    warning. A budget below n + 1 does not finish the first simplex, which is warned of. The same `f` gives the same
    result: nothing is drawn. Raises ValueError for a box without 0 inside, and for n, budget or radius that cannot be.
    """
    if n < 1 or budget < 1:
        raise ValueError(f"search: n={n!r} and budget={budget!r}: expected at least 1 of each")
    if not (math.isfinite(low) and math.isfinite(high) and low <= 0 <= high and low < high):
        raise ValueError(f"search: low={low!r}, high={high!r}: expected a box with 0 in it, where the search starts")
    if not 0 < radius < math.inf:
        raise ValueError(f"search: radius={radius!r}: expected a finite number above 0")
    if budget < n + 1:
        warnings.warn(
            f"a budget of {budget} is below the {n + 1} points that the search starts with for {n} adapters: some of "
            f"them are never tried",
            stacklevel=2,
        )
    log = _Log(f, budget)
    first = min(radius, high) if high >= min(radius, -low) else -min(radius, -low)
    points = torch.cat([torch.zeros(1, n, dtype=torch.float64), first * torch.eye(n, dtype=torch.float64)])
    values = log.measure(points)
    if len(values) == n + 1:
        _descend(log, points, values, low, high, radius)
    best = min(log.history, key=lambda tried: tried.value)
    return Found(best.weights, best.value, tuple(log.history))


class _Log:
    """Calls f, within the budget, and keeps what it gave."""

    def __init__(self, f: Callable[[Tensor], Sequence[float]], budget: int) -> None:
        self.f = f
        self.budget = budget
        self.history: list[Tried] = []
        self.warned = False

    @property
    def left(self) -> int:
        return self.budget - len(self.history)

    def measure(self, points: Tensor) -> Tensor:
        """The values of as many of the points as the budget allows."""
        points = points[: self.left]
        values = [float(value) for value in self.f(points.clone())]
        if any(math.isnan(value) for value in values) and not self.warned:
            warnings.warn("the search met a loss that is NaN, and counts it as infinite", stacklevel=4)
            self.warned = True
        values = [math.inf if math.isnan(value) else value for value in values]
        self.history += [Tried(tuple(p), v) for p, v in zip(points.tolist(), values, strict=True)]
        return torch.tensor(values, dtype=torch.float64)


def _descend(log: _Log, points: Tensor, values: Tensor, low: float, high: float, radius: float) -> None:
    """Steps until the budget or the radius is spent. points [n + 1, n] and values [n + 1] are written to."""
    least = _LEAST * radius
    repair = False
    while log.left and radius >= least:
        best = int(values.argmin())
        if not math.isfinite(float(values[best])):
            return
        others = torch.tensor([i for i in range(len(points)) if i != best])
        edges = points[others] - points[best]  # [n, n]
        normals = torch.linalg.pinv(edges).T  # [n, n]: row j is 1 along edge j and 0 along the others
        rises = _finite(values)[others] - values[best]
        slope = rises @ normals
        height, length = 1 / normals.norm(dim=1), edges.norm(dim=1)
        good = bool((height >= _FLAT * radius).all() and (length <= _FAR * radius).all())
        if repair and not good:
            far = int(length.argmax())
            worst = far if length[far] > _FAR * radius else int(height.argmin())
            away = normals[worst] / normals[worst].norm() * radius / 2
            sides = (points[best] + torch.stack([away, -away])).clamp(low, high)
            open_ = (sides - points[best]).norm(dim=1) * 1e6 - sides @ slope  # the side with room, then the lower one
            points[others[worst]] = sides[int(open_.argmax())]
            values[others[worst]] = log.measure(points[others[worst]][None])[0]
            repair = False
            continue
        step = _step(points[best], slope, radius, low, high)
        helps = False
        if step.norm() >= radius / 2:
            point = points[best] + step
            value = log.measure(point[None])[0]
            parts = (normals @ step).abs() * (length / radius).clamp(min=1)
            helps = bool(values[best] - value >= -0.1 * (slope @ step)) and bool(value < values[best])
            if value < values[best] or parts.max() > 1:
                place = others[int(parts.argmax())]
                points[place], values[place] = point, value
        if helps:
            repair = False
        elif good:
            radius /= 2
            repair = False
        else:
            repair = True


def _finite(values: Tensor) -> Tensor:
    """Values [n + 1] that a linear model can go through: above the largest finite one where they are not finite."""
    known = values[values.isfinite()]
    return values.where(values.isfinite(), known.max() + (known.max() - known.min()) + 1)


def _step(start: Tensor, slope: Tensor, radius: float, low: float, high: float) -> Tensor:
    """The step d [n] that minimises slope · d with |d| <= radius and start + d in the box.

    It is clip(start - t slope) - start for the t at which it is as long as the radius, or for t as large as it gets.
    """
    scale = float(slope.norm())
    if not scale:
        return torch.zeros_like(start)

    def at(t: float) -> Tensor:
        return (start - t / scale * slope).clamp(low, high) - start

    least, most = 0.0, 1e6 * radius
    if at(most).norm() <= radius:
        return at(most)
    for _ in range(80):
        middle = (least + most) / 2
        least, most = (middle, most) if at(middle).norm() <= radius else (least, middle)
    return at(least)
