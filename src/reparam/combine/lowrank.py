"""Sums of changes of one matrix, as factors where they have them and dense where not; and the nearest of a lower rank.

Shapes: ΔW [O, I] of out_features x in_features, A [R, I], B [O, R]. All of it is meant for float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reparam.core.base import Factors

_ROUNDING = torch.finfo(torch.float32).eps


def stacked(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Σ w_i B_i A_i, exactly: the A_i [R_i, I] below each other, the w_i B_i [O, R_i] beside each other.

    >>> one = Factors(torch.ones(1, 3), torch.ones(2, 1))
    >>> stacked([one, one], [2.0, 0.5]).B.tolist()
    [[2.0, 0.5], [2.0, 0.5]]
    """
    pairs = list(zip(weights, factors, strict=True))
    return Factors(torch.cat([f.A for _, f in pairs]), torch.cat([w * f.B for w, f in pairs], 1))


def summed(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """(Σ w_i B_i) (Σ w_i A_i), which has the rank R that all of them have: LoraHub's sum, w_i w_j of B_i A_j in it."""
    pairs = list(zip(weights, factors, strict=True))
    return Factors(
        torch.stack([w * f.A for w, f in pairs]).sum(0),
        torch.stack([w * f.B for w, f in pairs]).sum(0),
    )


def reduced(factors: Factors, rank: int) -> tuple[Factors, float, float]:
    """The nearest change of at most this rank, |ΔW| and |ΔW − nearest|, Frobenius norms; ΔW itself is not built.

    Two QR decompositions bring it to a product of [R, R] (Eckart-Young on that). A change whose rank is not above
    `rank` is returned as it is.
    """
    if len(factors.A) <= rank:
        return factors, factors.low_rank_norm(), 0.0
    u, s, vh = singular(factors)
    return _cut(u, s, vh, rank)


def singular(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """U [O, K], the singular values [K] in descending order and Vᵀ [K, I] of B·A; K is R, or less on small sides.

    From QR decompositions of B and Aᵀ and the SVD of a matrix of [K, K] at most; B·A itself is not built.

    >>> singular(Factors(torch.eye(2, 5), torch.tensor([[0.0, 3.0], [4.0, 0.0]])))[1].tolist()
    [4.0, 3.0]
    """
    q_b, r_b = torch.linalg.qr(factors.B)
    q_a, r_a = torch.linalg.qr(factors.A.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, vh @ q_a.T


def numeric_rank(values: Tensor) -> int:
    """How many singular values [K], in descending order, are more than rounding in float32 beside the largest.

    >>> numeric_rank(torch.tensor([1.0, 0.5, 1e-9])), numeric_rank(torch.zeros(3))
    (2, 0)
    """
    return int((values > _ROUNDING * values[:1]).sum())


def factored(change: Tensor, rank: int) -> tuple[Factors, float, float]:
    """The nearest factors of at most this rank to a dense ΔW [O, I], |ΔW| and |ΔW − nearest|."""
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    return _cut(u, s, vh, rank)


def _cut(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> tuple[Factors, float, float]:
    root = s[:rank].sqrt()
    return Factors(root[:, None] * vh[:rank], u[:, :rank] * root), float(s.norm()), float(s[rank:].norm())


def trimmed(change: Tensor, density: float) -> Tensor:
    """ΔW with its largest entries alone, that share of them; of equal ones at the border all stay."""
    count = max(1, round(density * change.numel()))
    size = change.abs()
    least = size.flatten().kthvalue(change.numel() - count + 1).values
    return change.where(size >= least, 0)


def ties(changes: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """TIES (Yadav et al. 2023, arXiv 2306.01708): trim each ΔW_i [O, I], elect a sign for each entry, and average.

    The sign is that of the weighted sum; the average is that of the w_i ΔW_i which have it and are not zero. So a
    common factor of the weights is the paper's λ. Trimming is in each matrix, where the paper's is in the whole model.
    """
    weighed = torch.stack([w * trimmed(change, density) for w, change in zip(weights, changes, strict=True)])
    agreeing = (weighed.sign() == weighed.sum(0).sign()) & (weighed != 0)
    return weighed.where(agreeing, 0).sum(0) / agreeing.sum(0).clamp(min=1)


def dare(changes: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator) -> Tensor:
    """DARE (Yu et al. 2023, arXiv 2311.03099): keep entries of each ΔW_i [O, I] with this chance, rescaled; add up."""
    total = torch.zeros_like(changes[0])
    for w, change in zip(weights, changes, strict=True):
        kept = torch.rand(change.shape, generator=generator).to(change.device) < density
        total += w / density * change.where(kept, 0)
    return total
