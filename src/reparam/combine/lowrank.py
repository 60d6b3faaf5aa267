"""Weighted sums of changes of one matrix, as factors or as dense matrices, and low-rank approximations of them.

Shapes: ΔW [O, I] with O out_features and I in_features, A [R, I], B [O, R]. The functions expect float64 tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reparam.core.base import Factors

_ROUNDING = torch.finfo(torch.float32).eps


def stacked(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The exact sum Σ w_i B_i A_i: the A_i [R_i, I] are concatenated by rows, the w_i B_i [O, R_i] by columns.

    >>> one = Factors(torch.ones(1, 3), torch.ones(2, 1))
    >>> stacked([one, one], [2.0, 0.5]).B.tolist()
    [[2.0, 0.5], [2.0, 0.5]]
    """
    pairs = list(zip(weights, factors, strict=True))
    return Factors(torch.cat([f.A for _, f in pairs]), torch.cat([w * f.B for w, f in pairs], 1))


def summed(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """LoraHub's sum (Σ w_i B_i) (Σ w_i A_i) of factors of the same rank; it has the cross terms w_i w_j B_i A_j."""
    pairs = list(zip(weights, factors, strict=True))
    return Factors(
        torch.stack([w * f.A for w, f in pairs]).sum(0),
        torch.stack([w * f.B for w, f in pairs]).sum(0),
    )


def reduced(factors: Factors, rank: int) -> tuple[Factors, float, float]:
    """The best approximation of B·A of at most this rank, |ΔW|, and |ΔW − approximation| (Frobenius norms).

    Truncates the SVD (Eckart-Young) of `singular`, which never builds ΔW. Factors whose rank is at most `rank` are
    returned unchanged.
    """
    if len(factors.A) <= rank:
        return factors, factors.low_rank_norm(), 0.0
    u, s, vh = singular(factors)
    return _cut(u, s, vh, rank)


def singular(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of B·A: U [O, K], the singular values [K] in descending order, and Vᵀ [K, I], with K = min(O, R, I).

    Computed from the QR decompositions of B and Aᵀ and the SVD of a matrix of at most [R, R]; B·A is never built.

    >>> singular(Factors(torch.eye(2, 5), torch.tensor([[0.0, 3.0], [4.0, 0.0]])))[1].tolist()
    [4.0, 3.0]
    """
    q_b, r_b = torch.linalg.qr(factors.B)
    q_a, r_a = torch.linalg.qr(factors.A.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, vh @ q_a.T


def numeric_rank(values: Tensor) -> int:
    """The number of singular values [K] above float32 rounding relative to the first; `values` must be descending.

    >>> numeric_rank(torch.tensor([1.0, 0.5, 1e-9])), numeric_rank(torch.zeros(3))
    (2, 0)
    """
    return int((values > _ROUNDING * values[:1]).sum())


def factored(change: Tensor, rank: int) -> tuple[Factors, float, float]:
    """The best approximation of a dense ΔW [O, I] of at most this rank, as factors, |ΔW|, and the error's norm."""
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    return _cut(u, s, vh, rank)


def _cut(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> tuple[Factors, float, float]:
    root = s[:rank].sqrt()
    return Factors(root[:, None] * vh[:rank], u[:, :rank] * root), float(s.norm()), float(s[rank:].norm())


def trimmed(change: Tensor, density: float) -> Tensor:
    """Set all but the share `density` of the entries of ΔW, those of largest magnitude, to zero.

    All entries that equal the smallest kept magnitude stay.
    """
    count = max(1, round(density * change.numel()))
    size = change.abs()
    least = size.flatten().kthvalue(change.numel() - count + 1).values
    return change.where(size >= least, 0)


def ties(changes: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """TIES (Yadav et al. 2023, arXiv 2306.01708): trim each ΔW_i [O, I], elect a sign for each entry, and average.

    The elected sign is the sign of the weighted sum. The result is the mean of those entries of w_i ΔW_i that are
    nonzero and have this sign, so a common factor of the weights is the paper's λ. This function trims each matrix by
    itself; the paper trims over the whole model.
    """
    weighed = torch.stack([w * trimmed(change, density) for w, change in zip(weights, changes, strict=True)])
    agreeing = (weighed.sign() == weighed.sum(0).sign()) & (weighed != 0)
    return weighed.where(agreeing, 0).sum(0) / agreeing.sum(0).clamp(min=1)


def dare(changes: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator) -> Tensor:
    """DARE (Yu et al. 2023, arXiv 2311.03099): keep each entry of ΔW_i [O, I] with probability `density`, divide the
    kept entries by `density`, and compute the weighted sum.
    """
    total = torch.zeros_like(changes[0])
    for w, change in zip(weights, changes, strict=True):
        kept = torch.rand(change.shape, generator=generator).to(change.device) < density
        total += w / density * change.where(kept, 0)
    return total
