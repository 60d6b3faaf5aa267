"""Adding a small update to a quantized matrix so that its effect survives, though most of its entries cannot.

Next to the gap between two levels an update is small: rounded to the nearest, nearly every entry keeps its code, and
the update is gone. To move fewer entries by a whole gap, in the right places, keeps its effect: what an adapter does is
ΔW x, which only sees the part of x in the rows of ΔW. So, from the nearest codes on, for each row, with an orthonormal
basis V [I, R] of where the update lives, codes are moved by one level until Vᵀ of what was written equals Vᵀ of the row
of W'. Those come first that gain most for the square of their step, since the square is the noise that is added
elsewhere; it spreads over all I directions, like the error that quantizing made in the first place.

Scales are not touched. Shapes: O out_features, I in_features, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 8
"""Passes over a row; each mends most of what the ones before left. More change little."""
SHARE = 8
"""A pass looks at the best I / SHARE entries of a row."""


def moves(missing: Tensor, up: Tensor, down: Tensor, basis: Tensor) -> Tensor:
    """By how many levels to move each code: -1, 0 or 1, int8 [O, I].

    Args:
        missing: W' less what the codes say now [O, I], in float32.
        up: the change [O, I] of an entry when its code is one higher; 0 where there is none.
        down: the same for one lower, at most 0.
        basis: V [1, I, R], orthonormal; or [O, I, 1], one unit vector for each row, where the update has no low rank.
    """
    left = _onto(basis, missing)  # [O, R]: what is still to be moved
    chosen = torch.zeros_like(missing, dtype=torch.int8)
    count = max(1, missing.shape[1] // SHARE)
    for _ in range(ROUNDS):
        wanted = _back(basis, left)
        step = torch.where(wanted > 0, up, down)
        gain, enough = step * wanted, left.square().sum(1, keepdim=True)
        fits = (chosen == 0) & (gain > 0) & (gain < 2 * enough)  # a larger one alone would overshoot
        best, place = torch.where(fits, wanted / step, 0).topk(count, dim=1)  # gain over the square of the step
        step, gain = step.gather(1, place), gain.gather(1, place)
        step = torch.where((best > 0) & (gain.cumsum(1) - gain / 2 <= enough), step, 0)
        after = left - _onto(basis, torch.zeros_like(missing).scatter_(1, place, step))
        better = after.norm(dim=1, keepdim=True) < left.norm(dim=1, keepdim=True)
        left = torch.where(better, after, left)
        taken = torch.where(better, step.sign(), 0).to(torch.int8)
        chosen += torch.zeros_like(chosen).scatter_(1, place, taken)
    return chosen


def _onto(basis: Tensor, rows: Tensor) -> Tensor:
    """Coordinates [O, R] of rows [O, I]."""
    return rows @ basis[0] if len(basis) == 1 else torch.linalg.vecdot(rows, basis[..., 0]).unsqueeze(1)


def _back(basis: Tensor, left: Tensor) -> Tensor:
    """Rows [O, I] with these coordinates [O, R]."""
    return left @ basis[0].T if len(basis) == 1 else left * basis[..., 0]
