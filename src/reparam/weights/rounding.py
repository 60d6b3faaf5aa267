"""Adding a small update to a packed matrix so that its effect survives, though most of its entries cannot.

Next to the gap between two levels an update is small: rounded to the nearest, nearly every entry keeps its code, and
the update is gone. To move fewer entries by a whole gap, in the right places, keeps its effect: what an adapter does is
ΔW x, which only sees the part of x in the rows of ΔW. So, from the nearest codes on, for each row, with an orthonormal
basis V [I, R] of where the update lives, codes are moved by one level until Vᵀ of what was written equals Vᵀ of the row
of W'. Those come first that gain most for the square of their step, since the square is the noise that is added
elsewhere; it spreads over all I directions, like the error that quantising made in the first place.

Scales are not touched. Shapes: O out_features, I in_features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_Map = Callable[[Tensor], Tensor]

ROUNDS = 8
"""Passes over a row; each mends most of what the ones before left. More change little."""
SHARE = 8
"""A pass looks at the best I / SHARE entries of a row."""


def moves(delta: Tensor, up: Tensor, down: Tensor, basis: Tensor | None) -> Tensor:
    """By how many levels to move each code: -1, 0 or 1, int8 [O, I].

    Args:
        delta: what is missing [O, I]: W' less what the codes say now, in float32.
        up: the change [O, I] of an entry when its code is one higher; 0 where there is none.
        down: the same for one lower, at most 0.
        basis: V [I, R], orthonormal; None for each row's own direction, where the update has no low rank.
    """
    onto, back = _own(delta) if basis is None else _shared(basis)
    left = onto(delta)  # [O, R]: what is still to be moved
    chosen = torch.zeros_like(delta, dtype=torch.int8)
    count = max(1, delta.shape[1] // SHARE)
    for _ in range(ROUNDS):
        wanted = back(left)
        step = torch.where(wanted > 0, up, down)
        worth = torch.where((step != 0) & (chosen == 0), wanted / step, 0)  # gain over the square of the step
        best, place = worth.topk(count, dim=1)
        step = step.gather(1, place)
        gain = step * wanted.gather(1, place)
        enough = left.square().sum(1, keepdim=True)
        step = torch.where((best > 0) & (gain.cumsum(1) - gain / 2 <= enough), step, 0)
        after = left - onto(torch.zeros_like(delta).scatter_(1, place, step))
        better = after.norm(dim=1, keepdim=True) < left.norm(dim=1, keepdim=True)
        left = torch.where(better, after, left)
        taken = torch.where(better, step.sign(), 0).to(torch.int8)
        chosen += torch.zeros_like(chosen).scatter_(1, place, taken)
    return chosen


def _shared(basis: Tensor) -> tuple[_Map, _Map]:
    """From rows [O, I] to coordinates [O, R] in one basis for all, and back."""
    return lambda rows: rows @ basis, lambda left: left @ basis.T


def _own(delta: Tensor) -> tuple[_Map, _Map]:
    """From rows [O, I] to a coordinate [O, 1] along each row's own direction, and back."""
    own = F.normalize(delta, dim=1)
    return lambda rows: (rows * own).sum(1, keepdim=True), lambda left: left * own
