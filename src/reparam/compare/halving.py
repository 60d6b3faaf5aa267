"""Successive halving of learning rates and contestants (Jamieson & Talwalkar 2016, arXiv 1502.07943).

Tuning has rungs, from short to long. A rung consists of complete runs, each with its own schedule from warm-up to the
end, for a share of the full number of steps. At a rung, every remaining contestant runs at each of its remaining rates,
with a seed that no scored run uses. The loss on the tuning rows decides; it is smoother than the share of correct
answers.

- The better half of each contestant's rates, rounded up, continues; after the last rung, the best rate is chosen.
- The better share `keep` of the contestants continues, ranked by the loss at their best rate, but at least `least` of
  them. A contestant on the loss/parameter Pareto front is never stopped early, and neither is the reference.

Short runs favor high rates and methods that start fast. `keep = 1` stops no contestant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from reparam.compare.pareto import front


def better_half(losses: Mapping[float, float]) -> list[float]:
    """Return the better half of the rates, rounded up, best first. `losses` has the loss by rate.

    Failed runs have an infinite loss; their rates continue only if all runs failed.

    >>> better_half({1e-4: 3.0, 1e-3: 1.0, 1e-2: float("inf")})
    [0.001, 0.0001]
    """
    order = sorted(losses, key=lambda rate: (losses[rate], rate))
    finite = [rate for rate in order if math.isfinite(losses[rate])]
    return (finite or order)[: math.ceil(len(losses) / 2)]


def stopped_early(
    losses: Mapping[str, float], parameters: Mapping[str, int], *, reference: str, keep: float, least: int
) -> dict[str, str]:
    """Return the contestants to stop after a rung, each with the reason.

    `losses` has each contestant's loss at its best rate, and `parameters` its number of trained parameters.
    """
    order = sorted(losses, key=lambda label: losses[label])
    places = max(least, math.ceil(keep * len(order)))
    spared = set(order[:places]) | {reference}
    finite = {label: (float(parameters[label]), losses[label]) for label in order if math.isfinite(losses[label])}
    spared |= set(front(finite, larger_is_better=False))
    best = losses[order[0]]
    return {
        label: f"place {order.index(label) + 1} of {len(order)} by loss ({losses[label]:.3f}; the best is "
        f"{best:.3f}), and another contestant has a lower loss with no more parameters"
        for label in order
        if label not in spared
    }
