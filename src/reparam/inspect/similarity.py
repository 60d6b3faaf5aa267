"""Measure which directions two adapters have in common (LoRA's paper, arXiv 2106.09685, §7.2 and appendix G).

    φ(i, j) = |U_iᵀ U'_j|² / min(i, j)        U_i [n, i], U'_j [n, j]: first singular directions of the two ΔW

φ is 1 if the smaller subspace lies in the larger one, and 0 if they are orthogonal. Its mean for random subspaces is
max(i, j) / n. Right directions (n = I) are those that ΔW reads; left directions (n = O) are those that it writes. The
paper compares the right singular directions of the factor A. This file uses those of ΔW, which do not depend on how ΔW
is split into factors; for i = R and j = R', the right ones span the same space as the rows of A.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reparam.inspect.spectrum import Spectrum


class Similarity(NamedTuple):
    """Similarity of the changes that two adapters of ranks R and R' make at one site."""

    left: Tensor  # [R, R']: φ(i, j) of output directions, at [i - 1, j - 1]
    right: Tensor  # [R, R']: φ(i, j) of input directions, at [i - 1, j - 1]
    shape: tuple[int, int]
    """(out_features, in_features)."""

    @property
    def whole(self) -> tuple[float, float]:
        """φ(R, R') of all directions: (left, right)."""
        return float(self.left[-1, -1]), float(self.right[-1, -1])

    @property
    def first(self) -> tuple[float, float]:
        """φ(1, 1) of the first directions: (left, right)."""
        return float(self.left[0, 0]), float(self.right[0, 0])

    @property
    def random(self) -> tuple[float, float]:
        """Mean of φ(R, R') for random subspaces: (left, right)."""
        most = max(self.left.shape)
        return min(1.0, most / self.shape[0]), min(1.0, most / self.shape[1])


@torch.no_grad()
def similarity(one: Spectrum, other: Spectrum) -> Similarity | None:
    """Compute φ(i, j) for two changes of one matrix, for all i and j up to their ranks; None if either is zero.

    Raises ValueError if the changes are of matrices of different sizes.
    """
    shape, its = ((seen.u.shape[0], seen.vh.shape[1]) for seen in (one, other))
    if shape != its:
        raise ValueError(f"one ΔW is {shape[0]} x {shape[1]}, and the other is {its[0]} x {its[1]}")
    if not one.rank or not other.rank:
        return None
    left = overlap(one.u[:, : one.rank], other.u[:, : other.rank])
    right = overlap(one.vh[: one.rank].T, other.vh[: other.rank].T)
    return Similarity(left, right, shape)


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """Compute φ(i, j), at [i - 1, j - 1] of a tensor [R, R'], from orthonormal columns [n, R] and [n, R'].

    >>> overlap(torch.eye(3)[:, :2], torch.eye(3)[:, 1:2]).tolist()
    [[0.0], [1.0]]
    """
    squares = (one.T @ other).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, n + 1, dtype=squares.dtype) for n in squares.shape)
    return (squares / torch.minimum(i[:, None], j)).clamp(max=1)
