"""Which directions two adapters have in common (LoRA's paper, arXiv 2106.09685, §7.2 and appendix G).

    φ(i, j) = |U_iᵀ U'_j|² / min(i, j)        U_i [n, i]: the first i singular directions of one, U'_j of the other

It is 1 where the smaller space lies in the larger and 0 where they are orthogonal. Two random spaces have max(i, j) / n
in the mean. Right directions, n = I, are those that ΔW reads; left ones, n = O, are those that it writes. The paper
compares the right-singular directions of the factor A; here both are of ΔW itself, which does not depend on how it is
split into factors. For i = R and j = R' the right ones span what A's rows do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reparam.inspect.spectrum import Spectrum


class Similarity(NamedTuple):
    """What the changes of one site have in common."""

    left: Tensor  # [R, R']: φ of output directions, at [i - 1, j - 1]
    right: Tensor  # [R, R']: of input directions
    shape: tuple[int, int]
    """O and I."""

    @property
    def whole(self) -> tuple[float, float]:
        """φ(R, R') of all directions, left and right."""
        return float(self.left[-1, -1]), float(self.right[-1, -1])

    @property
    def first(self) -> tuple[float, float]:
        """φ(1, 1) of the directions of the largest values, left and right."""
        return float(self.left[0, 0]), float(self.right[0, 0])

    @property
    def random(self) -> tuple[float, float]:
        """The mean of φ(R, R') of random spaces, left and right."""
        most = max(self.left.shape)
        return min(1.0, most / self.shape[0]), min(1.0, most / self.shape[1])


@torch.no_grad()
def similarity(one: Spectrum, other: Spectrum) -> Similarity | None:
    """φ for all i and j up to the ranks of two changes of one matrix; None where one of them changes nothing.

    Raises ValueError for matrices of different sizes.
    """
    shape, its = ((seen.u.shape[0], seen.vh.shape[1]) for seen in (one, other))
    if shape != its:
        raise ValueError(f"changes of {shape[0]} x {shape[1]} and of {its[0]} x {its[1]} are not of one matrix")
    if not one.rank or not other.rank:
        return None
    left = overlap(one.u[:, : one.rank], other.u[:, : other.rank])
    right = overlap(one.vh[: one.rank].T, other.vh[: other.rank].T)
    return Similarity(left, right, shape)


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """φ(i, j) at [i - 1, j - 1], from orthonormal columns [n, R] and [n, R'].

    >>> overlap(torch.eye(3)[:, :2], torch.eye(3)[:, 1:2]).tolist()
    [[0.0], [1.0]]
    """
    squares = (one.T @ other).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, n + 1, dtype=squares.dtype) for n in squares.shape)
    return (squares / torch.minimum(i[:, None], j)).clamp(max=1)
