"""Compute the largest singular values of W or ΔW as operators, in float64, with a block of rows of W at a time.

The randomized range finder (Halko, Martinsson, Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1) applies the matrix
D to a random matrix G with few columns, and then `PASSES` times to the result, which brings out the leading directions:

    Q = orth(D G);  repeat  Q = orth(D orth(Dᵀ Q));        D ≈ Q (Qᵀ D)

The computed singular values are those of Qᵀ D and never exceed those of D.

Shapes: O out_features, I in_features, K vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from reparam.core.base import Factors, Weight

EXTRA = 10
"""Number of random vectors beyond the number of requested singular values."""
PASSES = 8
"""Number of repetitions, for spectra that decay slowly."""


class Operator(NamedTuple):
    """A matrix D [O, I], given by its products with vectors."""

    shape: tuple[int, int]
    times: Callable[[Tensor], Tensor]
    """x [I, K] -> D x [O, K]."""
    back: Callable[[Tensor], Tensor]
    """y [O, K] -> Dᵀ y [I, K]."""


def of_weight(weight: Weight) -> Operator:
    """Return W, in any storage, as an operator."""

    def times(x: Tensor) -> Tensor:
        return torch.cat([block.detach().double() @ x for _, block in weight.blocks()])

    def back(y: Tensor) -> Tensor:
        return torch.stack([block.detach().double().T @ y[rows] for rows, block in weight.blocks()]).sum(0)

    return Operator((weight.out_features, weight.in_features), times, back)


def of_change(weight: Weight, factors: Factors) -> Operator:
    """Return ΔW = (diag(gain) - 1) W + B A, or B A without a gain, as an operator; the factors must be float64."""
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
    """Return U [O, K], values [K] and Vᵀ [K, I] for the largest K = min(count, O, I) singular values, in float64.

    The values are exact if K + `EXTRA` >= min(O, I); otherwise each value is at most the true one.

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
