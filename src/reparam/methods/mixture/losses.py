"""Auxiliary losses of mixtures: pure functions of probabilities, choices and a mask; scalars, 0 on an empty mask.

    name             formula                                             uniform        one expert has all
    switch_balance   N Σ f_i P_i                                         1              N
    mole_balance     −Σ log q_i − N log N                                0              ∞
    loramoe_blc      var(Z) / mean(Z)²                                   0 (α = 0)      large
    router_z         mean of logsumexp(z)²                               (log N)²       any
    contrastive      see `contrastive`

They are of one router each: taken over several at once, routers that have collapsed on different experts look balanced.
Each has a gradient, unlike some released code: MoLE's balance loss is detached there, MoV's is the constant E.

Shapes: p, used, logits [..., N]; valid [...], bool, the tokens that count, or None for all.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from reparam.core.dtypes import wide

LEAST = 1e-4
"""Share of its input's size below which an expert's output has no direction to compare."""


def switch_balance(p: Tensor, used: Tensor, valid: Tensor | None = None) -> Tensor:
    """N Σ f_i P_i (Fedus et al. 2021): f is each expert's share of the selections, P its mean probability.

    Differentiable through P alone. `used` is bool.

    >>> p = torch.full((3, 4), 0.25)
    >>> float(switch_balance(p, p > 0))
    1.0
    """
    chosen = _sum(used.to(p.dtype), valid)
    share = chosen / chosen.sum().clamp(min=1)
    return p.shape[-1] * (share.detach() * _mean(p, valid)).sum()


def mole_balance(p: Tensor, valid: Tensor | None = None) -> Tensor:
    """−Σ log q_i − N log N with q the mean of p (Wu et al. 2024, without their constant): 0 for uniform, else above."""
    n = p.shape[-1]
    q = _mean(p, valid)
    if valid is not None:
        q = torch.where(valid.any(), q, 1 / n)
    return -q.clamp(min=torch.finfo(q.dtype).tiny).log().sum() - n * math.log(n)


def loramoe_blc(p: Tensor, valid: Tensor | None = None, types: Tensor | None = None, alpha: float = 0.0) -> Tensor:
    """var(Z) / mean(Z)² of the importance Z [B, N], the sum of p [B, ..., N] over the tokens of a row (LoRAMoE).

    For rows of type 1 (`types` [B], 0 or 1) the first half of the experts counts 1 + alpha and the rest 1 − alpha; for
    the others it is the other way round.
    """
    kept = p if valid is None else p * valid.unsqueeze(-1)
    z = kept.reshape(len(p), -1, p.shape[-1]).sum(1)
    if types is not None and alpha:
        first = torch.arange(z.shape[-1], device=z.device) < z.shape[-1] // 2
        z = z * torch.where(first == (types == 1)[:, None], 1 + alpha, 1 - alpha)
    if z.numel() < 2:
        return z.sum() * 0
    return z.var() / (z.mean().square() + 1e-10)


def router_z(logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """The mean of logsumexp(z)² (Zoph et al. 2022): keeps logits small."""
    return _mean(torch.logsumexp(logits, -1).square().unsqueeze(-1), valid).squeeze(-1)


def contrastive(outputs: Tensor, expert: Tensor, size: Tensor, *, temperature: float = 0.1) -> Tensor:
    """InfoNCE over experts' outputs: those of one expert attract, those of others repel. Reconstructed (MoELoRA).

    For a pair a of a token and an expert, with z its normalized output, P(a) the other pairs of that expert and D(a)
    all other pairs: −mean over b in P(a) of log [exp(z_a·z_b / τ) / Σ over c in D(a) of exp(z_a·z_c / τ)]. The mean is
    over the pairs for which P(a) is not empty and there is a pair of another expert. Its least value is not 0: it is
    log(m − 1) for m pairs of each expert.

    outputs [S, O] before gate and scale; expert [S], its number; size [S], the norm of the expert's input. Pairs whose
    output is below `LEAST` of that are left out: their direction is noise, and its gradient grows as 1 / norm.
    """
    u = wide(outputs)
    there = u.detach().norm(dim=-1) > LEAST * size
    z = F.normalize(torch.where(there[:, None], u, torch.ones_like(u)), dim=-1)
    near = z @ z.t() / temperature
    others = there[None] & there[:, None] & ~torch.eye(len(u), dtype=torch.bool, device=u.device)  # D
    same = others & (expert[None] == expert[:, None])  # P
    counts = same.sum(1)
    anchors = (counts > 0) & (others & ~same).any(1)
    total = torch.logsumexp(near.masked_fill(~others, torch.finfo(near.dtype).min), 1)
    losses = total - (near * same).sum(1) / counts.clamp(min=1)
    return torch.where(anchors, losses, 0).sum() / anchors.sum().clamp(min=1)


def _sum(values: Tensor, valid: Tensor | None) -> Tensor:
    """The sum of [..., N] over all that counts, [N]."""
    kept = values if valid is None else values * valid.unsqueeze(-1)
    return kept.reshape(-1, values.shape[-1]).sum(0)


def _mean(values: Tensor, valid: Tensor | None) -> Tensor:
    count = values[..., 0].numel() if valid is None else valid.sum()
    return _sum(values, valid) / (max(count, 1) if isinstance(count, int) else count.clamp(min=1))
