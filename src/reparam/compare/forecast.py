"""What a comparison takes: the number of its runs before they start, and their time from the runs that have ended."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from reparam.compare.plan import CompareConfig
from reparam.compare.trial import Outcome


def runs(compare: CompareConfig, contestants: int, steps: int) -> list[tuple[int, int]]:
    """The most runs that the plan can take, as pairs (number of runs, steps of each): each rung, then the seeds.

    >>> runs(CompareConfig(rates=(1e-3, 1e-2, 1e-1), rungs=(0.5,), seeds=2), 4, 100)
    [(12, 50), (8, 100)]
    """
    found, rates = [], len(compare.rates)
    for share in compare.rungs:
        found.append((contestants * rates, rung_steps(share, steps)))
        rates = math.ceil(rates / 2)
    return [*found, (contestants * compare.seeds, steps)]


def rung_steps(share: float, steps: int) -> int:
    """Number of steps of a tuning run."""
    return min(steps, max(2, round(share * steps)))  # a single step would be warm-up only


def seconds(outcome: Outcome, steps: int) -> float:
    """Estimated seconds of a run with this many steps, from a run of the same contestant.

    What does not depend on the steps, such as loading the base and scoring, is taken to be the same.
    """
    each = outcome.step_seconds if outcome.step_seconds is not None else outcome.seconds / outcome.steps
    return max(0.0, outcome.seconds - each * outcome.steps) + each * steps


def seed_seconds(ended: Mapping[str, Outcome], labels: Sequence[str], steps: int) -> float:
    """Estimated seconds of one scored run of each contestant; 0 if no run has ended.

    `ended` has a run of a contestant by its label; the mean stands for contestants without one.
    """
    known = {label: seconds(outcome, steps) for label, outcome in ended.items()}
    mean = sum(known.values()) / len(known) if known else 0.0
    return sum(known.get(label, mean) for label in labels)
