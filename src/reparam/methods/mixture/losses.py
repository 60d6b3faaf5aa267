"""Auxiliary losses of mixtures: pure functions of probabilities, selections and a mask; scalars, 0 on an empty mask.

    name             formula                                             uniform        one expert gets all
    switch_balance   N Σ f_i P_i                                         1              N
    mole_balance     −Σ log q_i − N log N                                0              ∞
    loramoe_blc      var(Z) / mean(Z)²                                   0 (α = 0)      large
    router_z         mean of logsumexp(z)²                               (log N)²       any
    contrastive      see `contrastive`

Each is for a single router: over several routers at once, routers that collapsed to different experts would look
balanced. Each has a gradient, unlike in some released code: MoLE's balance loss is detached there, and MoV's is the
constant E.

Shapes: p, used, logits [..., N]; valid [...] bool, True for the tokens that count, or None for all tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from reparam.core.dtypes import wide

LEAST = 1e-4
"""An expert's output with a norm below this share of its input's norm is ignored by the contrastive loss."""


def switch_balance(p: Tensor, used: Tensor, valid: Tensor | None = None) -> Tensor:
    """N Σ f_i P_i (Fedus et al. 2021), with f_i an expert's share of the selections and P_i its mean probability.

    Only P has a gradient. `used` is bool [..., N].

    >>> p = torch.full((3, 4), 0.25)
    >>> float(switch_balance(p, p > 0))
    1.0
    """
    chosen = _sum(used.to(p.dtype), valid)
    share = chosen / chosen.sum().clamp(min=1)
    return p.shape[-1] * (share.detach() * _mean(p, valid)).sum()


def mole_balance(p: Tensor, valid: Tensor | None = None) -> Tensor:
    """−Σ log q_i − N log N, with q the mean of p (Wu et al. 2024, up to a constant): 0 for uniform q, else positive."""
    n = p.shape[-1]
    q = _mean(p, valid)
    if valid is not None:
        q = torch.where(valid.any(), q, 1 / n)
    return -q.clamp(min=torch.finfo(q.dtype).tiny).log().sum() - n * math.log(n)


def loramoe_blc(p: Tensor, valid: Tensor | None = None, types: Tensor | None = None, alpha: float = 0.0) -> Tensor:
    """var(Z) / mean(Z)² of the importance Z [B, N], the sum of p [B, ..., N] over the tokens of a row (LoRAMoE).

    `types` [B] holds 0 or 1. In rows of type 1, the importance of the first half of the experts is multiplied by
    1 + alpha and that of the rest by 1 − alpha; in rows of type 0 it is the reverse.
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
    """The mean of logsumexp(z)² (Zoph et al. 2022), which keeps the logits small."""
    return _mean(torch.logsumexp(logits, -1).square().unsqueeze(-1), valid).squeeze(-1)


def contrastive(outputs: Tensor, expert: Tensor, size: Tensor, *, temperature: float = 0.1) -> Tensor:
    """InfoNCE over experts' outputs: attracts those of one expert and repels those of others. Reconstructed (MoELoRA).

    A pair a is a token and an expert, and z_a is its normalized output. P(a) are the other pairs of the same expert,
    and D(a) are all other pairs. The loss of a is −mean over b in P(a) of log [exp(z_a·z_b / τ) / Σ over c in D(a) of
    exp(z_a·z_c / τ)]. The result is the mean over the pairs for which both the same expert has another pair and another
    expert has one. Its minimum is not 0, but log(m − 1) for m pairs per expert.

    outputs [S, O] are the experts' outputs before gate and scale, expert [S] their numbers, and size [S] the norms of
    the experts' inputs. Pairs whose output has a norm below `LEAST` · size are ignored: their direction is noise, and
    its gradient grows as 1 / norm.
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
    """The sum of values [..., N] over the valid tokens, [N]."""
    kept = values if valid is None else values * valid.unsqueeze(-1)
    return kept.reshape(-1, values.shape[-1]).sum(0)


def _mean(values: Tensor, valid: Tensor | None) -> Tensor:
    count = values[..., 0].numel() if valid is None else valid.sum()
    return _sum(values, valid) / (max(count, 1) if isinstance(count, int) else count.clamp(min=1))
