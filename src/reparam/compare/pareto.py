"""The Pareto front of a score and a cost."""

from __future__ import annotations

from collections.abc import Mapping


def front(points: Mapping[str, tuple[float, float]], *, larger_is_better: bool) -> list[str]:
    """Names of the points, each (cost, score), that no other point dominates, from the cheapest to the most expensive.

    One point dominates another if neither its cost nor its score is worse and at least one of them is better. Points
    with equal cost and equal score are all on the front.

    >>> front({"a": (1, 0.5), "b": (2, 0.9), "c": (3, 0.7)}, larger_is_better=True)
    ['a', 'b']
    """
    sign = -1 if larger_is_better else 1
    kept: list[str] = []
    best = (0.0, float("inf"))  # cost and loss of the last point added to the front
    for name, (cost, score) in sorted(points.items(), key=lambda item: (item[1][0], sign * item[1][1])):
        loss = sign * score
        if loss < best[1] or (cost, loss) == best:
            kept.append(name)
            best = (cost, loss)
    return kept
