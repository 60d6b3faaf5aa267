"""Which rates, and which contestants, go on: successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943).

Tuning has rungs: complete runs, each with its own schedule from warm-up to the end, at a share of the steps, the
shortest first. At a rung every contestant that is left runs at each of its rates that are left, with a seed that is
used for nothing else, and is judged by the loss on the tuning rows (smoother than counting right answers).

- Of each contestant's rates the better half goes on, rounded up; after the last rung the best one is its rate.
- Of the contestants the better share `keep` goes on, by the loss at the best rate, but never fewer than `least`. A
  contestant on the loss/parameter Pareto front is never stopped early, and neither is the reference.

Short runs favor high rates and methods that start fast. `keep = 1` stops no contestant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from reparam.compare.pareto import front


def better_half(losses: Mapping[float, float]) -> list[float]:
    """The rates with the lower losses, best first; runs that failed have an infinite loss, and go on only if all did.

    >>> better_half({1e-4: 3.0, 1e-3: 1.0, 1e-2: float("inf")})
    [0.001, 0.0001]
    """
    order = sorted(losses, key=lambda rate: (losses[rate], rate))
    finite = [rate for rate in order if math.isfinite(losses[rate])]
    return (finite or order)[: math.ceil(len(losses) / 2)]


def stopped_early(
    losses: Mapping[str, float], parameters: Mapping[str, int], *, reference: str, keep: float, least: int
) -> dict[str, str]:
    """The contestants that are stopped after a rung, and for each a sentence that says why.

    `losses` has the loss of each at its best rate.
    """
    order = sorted(losses, key=lambda label: losses[label])
    places = max(least, math.ceil(keep * len(order)))
    spared = set(order[:places]) | {reference}
    finite = {label: (float(parameters[label]), losses[label]) for label in order if math.isfinite(losses[label])}
    spared |= set(front(finite, larger_is_better=False))
    best = losses[order[0]]
    return {
        label: f"place {order.index(label) + 1} of {len(order)} by loss ({losses[label]:.3f}, and {best:.3f} is the "
        f"best), while another has a lower loss with no more parameters"
        for label in order
        if label not in spared
    }
