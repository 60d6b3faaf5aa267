"""Mix rows of several sources by weight."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from reparam.core.text import counted

Mix = Literal["under", "over"]


def mixed(sources: Sequence[np.ndarray], weights: Sequence[float], mix: Mix, seed: int) -> list[np.ndarray]:
    """The rows to take from each source, so that the sources have these shares of all rows.

    `sources` holds the numbers of the rows of each source, and `weights` a number above 0 for each. With "under", no
    row is taken twice, and rows are left out of all sources but the scarcest; with "over", all rows are taken, and rows
    of all sources but the most plentiful are repeated. Which rows depends on the seed alone. Without weights, all rows
    are taken once.

    >>> few, many = np.arange(10), np.arange(10, 110)
    >>> [len(rows) for rows in mixed([few, many], [1, 1], "under", seed=0)]
    [10, 10]
    >>> [len(rows) for rows in mixed([few, many], [1, 1], "over", seed=0)]
    [100, 100]
    """
    assert mix in get_args(Mix)
    if not weights:
        return list(sources)
    draw = random.Random(seed)
    totals = [len(rows) / weight for rows, weight in zip(sources, weights, strict=True)]
    unit = min(totals) if mix == "under" else max(totals)
    return [_drawn(rows, max(1, round(weight * unit)), draw) for rows, weight in zip(sources, weights, strict=True)]


def _drawn(rows: np.ndarray, count: int, draw: random.Random) -> np.ndarray:
    """This many of the rows, in order: all of them as often as they fit, and a random choice for the rest."""
    if not len(rows):
        return rows
    times, rest = divmod(count, len(rows))
    chosen = draw.sample(range(len(rows)), rest)
    return np.sort(np.concatenate([np.tile(rows, times), rows[chosen]]).astype(np.int64))


def told(names: Sequence[str], sources: Sequence[np.ndarray], taken: Sequence[np.ndarray]) -> tuple[str, ...]:
    """One line for each source of several: its rows, and its share of all rows."""
    total = sum(len(rows) for rows in taken)
    lines = []
    for name, rows, chosen in zip(names, sources, taken, strict=True):
        repeated = f", each {len(chosen) / len(rows):.3g} times" if len(chosen) > len(rows) else ""
        used = f"{min(len(chosen), len(rows)):,} of {counted(len(rows), 'row')}{repeated}"
        lines.append(f"{name}: {used} ({len(chosen) / total:.0%} of all)")
    return tuple(lines)
