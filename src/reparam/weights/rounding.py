"""Merge a small update into a quantized matrix so that its effect on the output survives rounding.

An update is small compared with the gap between two quantization levels. If W' is rounded to the nearest level, nearly
every entry keeps its code and the update is lost. Its effect can be kept by moving a few well-chosen entries by a whole
level: an adapter contributes ΔW x, which depends only on the component of x in the row space of ΔW. Let V [I, R] be an
orthonormal basis of that space. Starting from the nearest codes, codes of each row are moved by one level until the
projection of the quantized row onto V equals that of the row of W'. Entries with the largest gain per squared step are
moved first: the squared step is the noise added outside V, which spreads over all I directions like the original
quantization error.

The scales do not change. Shapes: O out_features, I in_features, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 8
"""Passes over a row. Each corrects most of the remaining error; more passes change little."""
SHARE = 8
"""Each pass considers the best I / SHARE entries of a row."""


def moves(missing: Tensor, up: Tensor, down: Tensor, basis: Tensor) -> Tensor:
    """The number of levels to move each code: -1, 0 or 1, int8 [O, I].

    Args:
        missing: W' minus the dequantized codes [O, I], in float32.
        up: the change [O, I] of each entry if its code is one higher; 0 if there is no higher code.
        down: the same for one lower, a number of at most 0.
        basis: V [1, I, R], orthonormal; or [O, I, 1], one unit vector per row, if the update is not of low rank.
    """
    left = _onto(basis, missing)  # [O, R]: the error that remains in the basis
    chosen = torch.zeros_like(missing, dtype=torch.int8)
    count = max(1, missing.shape[1] // SHARE)
    for _ in range(ROUNDS):
        wanted = _back(basis, left)
        step = torch.where(wanted > 0, up, down)
        gain, enough = step * wanted, left.square().sum(1, keepdim=True)
        fits = (chosen == 0) & (gain > 0) & (gain < 2 * enough)  # a larger step would overshoot by itself
        best, place = torch.where(fits, wanted / step, 0).topk(count, dim=1)  # gain per squared step
        step, gain = step.gather(1, place), gain.gather(1, place)
        step = torch.where((best > 0) & (gain.cumsum(1) - gain / 2 <= enough), step, 0)
        after = left - _onto(basis, torch.zeros_like(missing).scatter_(1, place, step))
        better = after.norm(dim=1, keepdim=True) < left.norm(dim=1, keepdim=True)
        left = torch.where(better, after, left)
        taken = torch.where(better, step.sign(), 0).to(torch.int8)
        chosen += torch.zeros_like(chosen).scatter_(1, place, taken)
    return chosen


def _onto(basis: Tensor, rows: Tensor) -> Tensor:
    """The coordinates [O, R] of rows [O, I] in the basis."""
    return rows @ basis[0] if len(basis) == 1 else torch.linalg.vecdot(rows, basis[..., 0]).unsqueeze(1)


def _back(basis: Tensor, left: Tensor) -> Tensor:
    """The rows [O, I] that have these coordinates [O, R]."""
    return left @ basis[0].T if len(basis) == 1 else left * basis[..., 0]
