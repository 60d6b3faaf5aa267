"""Auxiliary losses where they arise: computed at a site, sent into the backward pass, noted in the forward's record.

A loss is attached to the output of its site: the backward pass through that output also gives the loss its gradient, so
that it reaches the router and the experts in any training loop, and is in no loss that is returned. It counts as
`Forward.share` says. That happens in training mode and with gradients alone.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from reparam.methods.mixture import experts, losses
from reparam.methods.mixture.common import Common
from reparam.methods.mixture.select import Gating
from reparam.methods.mixture.settings import MixtureSettings


class RoutedSite(Protocol):
    """What a loss asks of the site that it arises at: a `MixtureUpdate`."""

    A: Tensor  # [R, I]
    B: Tensor  # [O, R]
    method: MixtureSettings
    ranks: tuple[int, ...]
    site: str
    leads: bool
    training: bool

    @property
    def common(self) -> Common:
        """What the sites of the mixture share."""


def with_losses(y: Tensor, x: Tensor, choice: Gating, site: RoutedSite) -> Tensor:
    """y [..., O], the site's output for x [..., I], with its losses attached."""
    method, now = site.method, site.common.now
    if not (method.losses and site.training and torch.is_grad_enabled()):
        return y
    for name, factor in method.losses.items():
        loss = _loss(name, x, choice, site) if factor else None
        if loss is not None:
            now.losses[name, site.site] = loss.detach()
            if loss.requires_grad:
                y = _Attached.apply(y, loss, factor * now.share)
    return y


def _loss(name: str, x: Tensor, choice: Gating, site: RoutedSite) -> Tensor | None:
    """One auxiliary loss; None where another site of the scope has it."""
    method, now, lead = site.method, site.common.now, x.shape[:-1]
    if name == "contrastive":
        if not site.common.contrasts:
            return None
        used = now.spread(choice.counted, lead).expand(*lead, -1)
        valid = now.valid(lead)
        used = used if valid is None else used & valid.unsqueeze(-1)
        rows = x.reshape(-1, x.shape[-1])
        A, B = site.A.to(rows.dtype), site.B.to(rows.dtype)
        pairs = experts.some_outputs(rows, A, B, used.reshape(len(rows), -1), site.ranks, method.contrastive_pairs)
        return losses.contrastive(*pairs, temperature=method.contrastive_temperature)
    if not site.leads:
        return None
    by_token = choice.p.shape[:-1] == lead
    valid = now.valid(lead) if by_token else None
    match name:
        case "switch_balance":
            return losses.switch_balance(choice.p, choice.counted, valid)
        case "mole_balance":
            return losses.mole_balance(choice.p, valid)
        case "router_z":
            return losses.router_z(choice.logits, valid)
        case _:
            p = now.by_row(choice.p) if by_token else choice.p
            valid = None if valid is None else valid.reshape(p.shape[:-1])
            types = now.tasks if method.blc_alpha else None
            return losses.loramoe_blc(p, valid, types, method.blc_alpha)


class _Attached(torch.autograd.Function):
    """y, as it is. In the backward pass the loss gets its factor as gradient, whatever y's gradient is."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, factor: Tensor | float) -> Tensor:
        ctx.factor, ctx.like = factor, loss.detach()
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        return g, torch.ones_like(ctx.like) * ctx.factor, None
