"""Matrices as operators: W, ΔW and their largest singular values, a block of rows of W at a time, in float64.

A randomized range finder (Halko, Martinsson, Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1) applies the matrix
to a few random vectors, and again to what came out, so that the leading directions come to the front:

    Q = orth(D G);  then, some times,  Q = orth(D orth(Dᵀ Q));        D ≈ Q (Qᵀ D)

The values found are those of Qᵀ D, which never exceed those of D.

Shapes: O out_features, I in_features, K vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from reparam.core.base import Factors, Weight

EXTRA = 10
"""Random vectors beyond the number of values that are asked for."""
PASSES = 8
"""How often the matrix is applied again, for spectra that fall slowly."""


class Operator(NamedTuple):
    """A matrix [O, I] that can be applied."""

    shape: tuple[int, int]
    times: Callable[[Tensor], Tensor]
    """x [I, K] -> D x [O, K]."""
    back: Callable[[Tensor], Tensor]
    """y [O, K] -> Dᵀ y [I, K]."""


def of_weight(weight: Weight) -> Operator:
    """W, however it is stored."""

    def times(x: Tensor) -> Tensor:
        return torch.cat([block.detach().double() @ x for _, block in weight.blocks()])

    def back(y: Tensor) -> Tensor:
        return torch.stack([block.detach().double().T @ y[rows] for rows, block in weight.blocks()]).sum(0)

    return Operator((weight.out_features, weight.in_features), times, back)


def of_change(weight: Weight, factors: Factors) -> Operator:
    """ΔW = (diag(gain) - 1) W + B A, from factors in float64."""
    A, B = factors.A, factors.B
    frozen = of_weight(weight)
    if factors.gain is None:
        return Operator(frozen.shape, lambda x: B @ (A @ x), lambda y: A.T @ (B.T @ y))
    less = factors.gain[:, None] - 1
    return Operator(
        frozen.shape,
        lambda x: less * frozen.times(x) + B @ (A @ x),
        lambda y: frozen.back(less * y) + A.T @ (B.T @ y),
    )


def leading(matrix: Operator, count: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """U [O, K], values [K] and Vᵀ [K, I] of the largest K = min(count, O, I) singular values, float64.

    Exact where K is near the smaller side; else each value is at most the true one.

    >>> d = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    >>> [round(v, 6) for v in leading(Operator((3, 3), lambda x: d @ x, lambda y: d.T @ y), 2)[1].tolist()]
    [3.0, 2.0]
    """
    rows, columns = matrix.shape
    kept = min(count, rows, columns)
    draw = torch.Generator().manual_seed(seed)
    start = torch.randn(columns, min(kept + EXTRA, rows, columns), generator=draw, dtype=torch.float64)
    q = torch.linalg.qr(matrix.times(start))[0]
    for _ in range(PASSES):
        q = torch.linalg.qr(matrix.times(torch.linalg.qr(matrix.back(q))[0]))[0]
    u, values, vh = torch.linalg.svd(matrix.back(q).T, full_matrices=False)
    return (q @ u)[:, :kept], values[:kept], vh[:kept]
