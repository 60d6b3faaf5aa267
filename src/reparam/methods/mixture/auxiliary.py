"""Auxiliary losses of a site: computed in its forward, added to the backward pass, and recorded in `Forward.losses`.

A loss is attached to the output of its site: the backward pass through that output also backpropagates the loss. It
therefore trains the router and the experts in any training loop, and the loss that the model returns does not include
it. Its factor is multiplied by `Forward.share`. Losses are computed only in training mode with gradients enabled.
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
    """The attributes of a site that its losses need; `MixtureUpdate` has them."""

    A: Tensor  # [R, I]
    B: Tensor  # [O, R]
    method: MixtureSettings
    ranks: tuple[int, ...]
    site: str
    leads: bool
    training: bool

    @property
    def common(self) -> Common:
        """The state that all sites of the mixture share."""


def with_losses(y: Tensor, x: Tensor, choice: Gating, site: RoutedSite) -> Tensor:
    """The site's output y [..., O] for x [..., I], with the auxiliary losses attached."""
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
    """One auxiliary loss, a scalar; None if another site of the scope computes it or the loss is off."""
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
            valid = None if valid is None else now.by_row(valid[..., None])[..., 0]
            types = now.tasks if method.blc_alpha else None
            return losses.loramoe_blc(p, valid, types, method.blc_alpha)


class _Attached(torch.autograd.Function):
    """Returns y unchanged. In the backward pass the gradient of the loss is its factor, independent of y's gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, factor: Tensor | float) -> Tensor:
        ctx.factor, ctx.like = factor, loss.detach()
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        return g, torch.ones_like(ctx.like) * ctx.factor, None
