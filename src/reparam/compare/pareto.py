"""What nothing else beats: the Pareto front of a score and a cost."""

from __future__ import annotations

from collections.abc import Mapping


def front(points: Mapping[str, tuple[float, float]], *, larger_is_better: bool) -> list[str]:
    """The names that no other point beats, cheapest first. A point is a cost and a score.

    One point beats another if it costs no more and scores no worse, and is better in one of the two. Points that are
    equal in both are all on the front.

    >>> front({"a": (1, 0.5), "b": (2, 0.9), "c": (3, 0.7)}, larger_is_better=True)
    ['a', 'b']
    """
    sign = -1 if larger_is_better else 1
    kept: list[str] = []
    best = (0.0, float("inf"))  # cost and loss of the last point that went on the front
    for name, (cost, score) in sorted(points.items(), key=lambda item: (item[1][0], sign * item[1][1])):
        loss = sign * score
        if loss < best[1] or (cost, loss) == best:
            kept.append(name)
            best = (cost, loss)
    return kept
