"""Weighted sums over all experts of one site, computed in the space of their ranks and never as [..., N, O].

    delta     y += s B [repeat(g) ∘ (A x)]          A [R, I], B [O, R]: the factors of all experts, concatenated
    factor    y += s Σ_i g_i B_i Σ_j g_j A_j x      A and B are mixed separately, with the same weights
    shared    y += s B [g ⊗ (A x)]                  one A [r, I] for all experts, B [O, N r] (HydraLoRA)

Shapes: T tokens of a flattened batch, I in_features, O out_features, R sum of the ranks, N experts. slots [R] holds the
number of the expert of each rank. The weights g are [T, N], or [1, N] if they are the same for all tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def delta(x: Tensor, A: Tensor, g: Tensor, slots: Tensor) -> Tensor:
    """repeat(g) ∘ (A x), [T, R]."""
    return F.linear(x, A) * g.to(A.dtype).index_select(1, slots)


def factor(x: Tensor, A: Tensor, g: Tensor) -> Tensor:
    """g ⊗ Σ_j g_j A_j x, [T, R]; all experts must have the same rank."""
    h = F.linear(x, A).view(len(x), g.shape[-1], len(A) // g.shape[-1])  # [T, N, r]
    g = g.to(A.dtype).unsqueeze(-1)
    return (g * (g * h).sum(1, keepdim=True)).flatten(1)


def shared(x: Tensor, A: Tensor, g: Tensor) -> Tensor:
    """g ⊗ (A x), [T, N r]."""
    return (g.to(A.dtype).unsqueeze(-1) * F.linear(x, A).unsqueeze(1)).flatten(1)


def scatter(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, g: Tensor, used: Tensor, ranks: tuple[int, ...], scale: float
) -> Tensor:
    """Add the sum of `delta` to y [T, O] in place, running each expert on its tokens only; used [T, N] bool."""
    g = g.to(A.dtype)
    for i, (a, b) in enumerate(zip(A.split(ranks), B.split(ranks, 1), strict=True)):
        tokens = used[:, i].nonzero().flatten()
        h = F.linear(x[tokens], a) * (scale * g[tokens, i, None])
        y = y.index_add_(0, tokens, F.linear(h, b).to(y.dtype))
    return y


def some_outputs(
    x: Tensor, A: Tensor, B: Tensor, used: Tensor, ranks: tuple[int, ...], most: int
) -> tuple[Tensor, ...]:
    """Outputs B_i A_i x of the experts for a sample of the tokens that use them.

    The sample has at most max(2, `most` / N) tokens of each expert, evenly spaced over them; used [T, N] is bool.
    Returns the outputs [S, O], the numbers of their experts [S], and the norms of their inputs [S].
    """
    outputs, experts, sizes = [], [], []
    for i, (a, b) in enumerate(zip(A.split(ranks), B.split(ranks, 1), strict=True)):
        tokens = used[:, i].nonzero().flatten()
        limit = max(2, most // len(ranks))
        if len(tokens) > limit:
            tokens = tokens[torch.linspace(0, len(tokens) - 1, limit, device=x.device).long()]
        chosen = x[tokens]
        outputs.append(F.linear(F.linear(chosen, a), b))
        experts.append(torch.full((len(tokens),), i, device=x.device))
        sizes.append(chosen.detach().float().norm(dim=-1))
    return torch.cat(outputs), torch.cat(experts), torch.cat(sizes)


def products(A: Tensor, B: Tensor, slots: Tensor, n: int) -> Tensor:
    """Frobenius inner products of the experts' updates B_i A_i, [N, N] in float64, from [R, R] products only.

    A is [R, I], or [r, I] if all experts share it.
    """
    a, b = A.double(), B.double()
    a = a.repeat(n, 1) if len(a) < len(slots) else a
    product = (b.t() @ b) * (a @ a.t())  # [R, R]
    owner = F.one_hot(slots, n).double()
    return owner.t() @ product @ owner


def products_of_vectors(vectors: Tensor) -> Tensor:
    """Inner products of the experts' changes l_i − 1, [N, N] in float64, from vectors l [N, O]."""
    moved = vectors.double() - 1
    return moved @ moved.t()
