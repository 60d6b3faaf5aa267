"""Recommend a contestant in one sentence, or say that the difference is within noise.

A contestant is within noise of the best one if the 95 % interval of their difference, paired by seed, contains 0. The
contestant with the fewest trained parameters among these is recommended. Contestants with a failed run are never
recommended. If no contestant is better than the base, none is recommended.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from reparam.compare.statistics import Interval, interval, paired


def recommend(
    values: Mapping[str, Mapping[int, float]],
    parameters: Mapping[str, int],
    reference: str,
    metric: str,
    failed: Collection[str],
    base: float | None,
    *,
    larger: bool,
) -> str:
    """Return the recommendation.

    `values` has each contestant's score by seed and `parameters` its number of trained parameters. `failed` are the
    contestants with a failed run. `base` is the score of the base without an adapter, or None if it is not known.
    `larger` tells whether larger scores are better.
    """
    means = {label: interval(list(v.values())).mean for label, v in values.items() if v and label not in failed}
    if not means:
        return "There is nothing to compare yet: every contestant has a failed run or no scored run."
    order = sorted(means, key=lambda label: -means[label] if larger else means[label])
    best = order[0]
    if base is not None and not (means[best] > base if larger else means[best] < base):
        return (
            f"No contestant is better than the base without an adapter ({_score(base, metric)}; the best is {best}, "
            f"{means[best]:.3f}): train longer, try other learning rates, or choose a more sensitive metric."
        )
    if len(order) == 1:
        return f"{best} is the only contestant with scored runs ({_score(means[best], metric)})."
    seeds = min(len(values[label]) for label in order)
    if seeds < 2:
        return (
            f"{best} has the best {metric} ({means[best]:.3f}), but one seed per contestant cannot distinguish a "
            f"difference from noise: run more seeds."
        )
    near = [label for label in order if label == best or _within(paired(values[label], values[best]))]
    taken = min(near, key=lambda label: (parameters[label], order.index(label)))
    if best == reference:
        rest = [label for label in near if label != best]
        if not rest:
            return f"Take {best}: no other is within noise of it ({_score(means[best], metric)}, {seeds} seeds)."
        return (
            f"The difference is within noise: {best} is the best ({_score(means[best], metric)}), and {seeds} seeds "
            f"cannot distinguish it from {_listed(rest)}{_smallest(taken, near, parameters)}."
        )
    if reference in near:
        difference = paired(values[best], values[reference])
        return (
            f"The difference is within noise: {best} is ahead of {reference} by {_shown(difference)}, over {seeds} "
            f"seeds{_smallest(taken, near, parameters)}."
        )
    difference = paired(values[taken], values[reference]) if reference in means else None
    ahead = f", {_shown(difference)} better than {reference}" if difference is not None else ""
    if taken == best:
        return f"Take {best}: {_score(means[best], metric)}{ahead}, over {seeds} seeds."
    return (
        f"Take {taken}: {_score(means[taken], metric)}{ahead}. It is within noise of {best}, the best "
        f"({means[best]:.3f}), and the smallest of the {len(near)} that are ({parameters[taken]:,} trained parameters)."
    )


def _within(difference: Interval | None) -> bool:
    return difference is None or difference.holds_zero


def _score(mean: float, metric: str) -> str:
    return f"{metric} {mean:.3f}"


def _shown(difference: Interval | None) -> str:
    assert difference is not None
    half = difference.half
    return f"{abs(difference.mean):.3f}" + (f" ± {half:.3f}" if half is not None else "")


def _smallest(taken: str, near: Collection[str], parameters: Mapping[str, int]) -> str:
    return (
        f"; the smallest of the {len(near)} that are within noise is {taken} ({parameters[taken]:,} trained parameters)"
    )


def _listed(labels: list[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} and {labels[-1]}"
