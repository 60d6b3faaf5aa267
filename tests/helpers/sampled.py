"""Samples of large products of cases. With `REPARAM_TESTS=full` (`make full`) they are the whole products."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from typing import Any

FULL = os.environ.get("REPARAM_TESTS") == "full"
"""Whether the suite runs every combination."""


def pairs(*axes: Iterable[Any], full: bool = FULL) -> list[tuple[Any, ...]]:
    """Cases in which every value of an axis meets every value of every other axis; in the full suite, the product."""
    listed = [list(axis) for axis in axes]
    product = list(itertools.product(*map(range, map(len, listed))))
    if not full:
        product = _covering(product)
    return [tuple(axis[i] for axis, i in zip(listed, case, strict=True)) for case in product]


def in_turn(*axes: Iterable[Any], full: bool = FULL) -> list[tuple[Any, ...]]:
    """As many cases as the longest axis has values; those of the others take turns. In the full suite, the product.

    The second round of a shorter axis begins one value later, so that it does not repeat the cases of the first.
    """
    listed = [list(axis) for axis in axes]
    if full:
        return list(itertools.product(*listed))
    most = max(map(len, listed))
    rounds = [[i // len(axis) if len(axis) < most else 0 for i in range(most)] for axis in listed]
    return [tuple(axis[(i + r[i]) % len(axis)] for axis, r in zip(listed, rounds, strict=True)) for i in range(most)]


def _covering(product: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """A greedy choice: always the case with the most pairs that no case before it has; the first of equals."""
    left = {case: set(itertools.combinations(enumerate(case), 2)) for case in product}
    chosen = []
    while left:
        best = max(left, key=lambda case: len(left[case]))
        covered = set(left[best])
        chosen.append(best)
        left = {case: rest for case, found in left.items() if (rest := found - covered)}
    return sorted(chosen)
