"""Updates of an intrinsic space: whole matrices or factors, and biases, computed from the shared parameters θ and λ.

Shapes: O out_features, I in_features, N rows of a flattened batch, d length of θ, m groups, D entries of a tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.core.base import Factors, Role, Update, Weight
from reparam.core.dtypes import compute_dtype
from reparam.core.placing import Stays
from reparam.methods.full import of_matrix
from reparam.methods.projections import Projection


@dataclasses.dataclass(frozen=True)
class Move:
    """How one tensor depends on θ: through a random map, and a λ if it has one."""

    projection: Projection
    group: int | None
    """Index of its λ, from 0 to m − 1; None without λ."""


class Space(Stays):
    """Parameters that all sites share: θ [d], zero at first, and for mode "said" also `scale`, λ [m], 1 at first."""

    scale: nn.Parameter | None

    def __init__(self, d: int, groups: list[str]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(d))
        self.register_parameter("scale", nn.Parameter(torch.ones(len(groups))) if groups else None)
        self.groups = groups

    def factor(self, move: Move) -> Tensor | None:
        """λ of a tensor, a scalar; None without λ."""
        return None if move.group is None or self.scale is None else self.scale[move.group]

    def moved(self, move: Move) -> Tensor:
        """λ P θ [D], differentiable. The backward pass draws P again, so that P is not saved."""
        found, factor = move.projection(self.theta), self.factor(move)
        return found if factor is None else factor * found


class _Update(Update):
    """The update of one site. It has no parameters of its own: the shared `Space` has them."""

    roles: ClassVar[Mapping[str, Role]] = {}

    def __init__(self, space: Space, move: Move, bias: Move | None = None) -> None:
        super().__init__()
        self.owner = (space,)  # in a tuple, so that it is not a submodule here: the model's root owns it
        self.move, self.bias = move, bias

    def moved(self) -> Tensor:
        """λ P θ [D], the change of the weight or of its factors."""
        return self.owner[0].moved(self.move)

    def bias_delta(self) -> Tensor | None:
        """λ P θ [O], the change of the bias; None if the bias does not change."""
        return None if self.bias is None else self.owner[0].moved(self.bias)

    def changed_bias(self, bias: Tensor | None) -> Tensor | None:
        """bias [O] plus its change, in the dtype of the bias."""
        offset = self.bias_delta()
        return bias if bias is None or offset is None else (bias + offset).to(bias.dtype)


class WeightUpdate(_Update):
    """Changes the whole weight matrix: ΔW [O, I] = λ P θ."""

    def forward(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [..., I] -> x (W + ΔW)ᵀ + bias [..., O]."""
        dtype = compute_dtype(x)
        rows = x.reshape(-1, x.shape[-1])
        plain = weight.dense_or_none
        once = plain is not None and plain.dtype in (torch.float32, torch.float64) and dtype == plain.dtype
        bias = self.changed_bias(bias)
        y = None if once else weight(rows, bias)
        space, shape = self.owner[0], (weight.out_features, weight.in_features)
        own = (plain, bias) if once else (None, None)
        factor, projection = space.factor(self.move), self.move.projection
        more: Tensor = _Moved.apply(rows.to(dtype), space.theta, factor, *own, projection, shape)
        y = more if y is None else y + more.to(y.dtype)
        return y.view(*x.shape[:-1], weight.out_features)

    def factors(self, weight: Weight) -> Factors:
        """ΔW [O, I] and an identity, as factors."""
        return of_matrix(self.moved().view(weight.out_features, weight.in_features))

    def rows(self, ids: Tensor, weight: Weight) -> Tensor:
        """ids [...] -> rows of W + ΔW, [..., I]."""
        found = weight.rows(ids)
        delta = self.moved().view(weight.out_features, weight.in_features)
        return found + F.embedding(ids, delta).to(found.dtype)


class FactorUpdate(_Update):
    """Changes two factors, which start at A_0 [r, I] and at zero [O, r]."""

    start: Tensor

    def __init__(self, space: Space, move: Move, bias: Move | None = None, *, start: Tensor) -> None:
        super().__init__(space, move, bias)
        self.register_buffer("start", start, persistent=False)  # not saved, because it is drawn again from the seed

    def forward(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [..., I] -> x Wᵀ + bias + (x Aᵀ) Bᵀ [..., O]."""
        dtype = compute_dtype(x)
        A, B, _ = self.factors(weight)
        rows = x.reshape(-1, x.shape[-1])
        y = weight(rows, self.changed_bias(bias)).addmm_(F.linear(rows.to(dtype), A.to(dtype)), B.to(dtype).t())
        return y.view(*x.shape[:-1], weight.out_features)

    def factors(self, weight: Weight) -> Factors:
        """A = A_0 + the first r I entries of λ P θ [r, I], and B = the other entries [O, r]."""
        moved, first = self.moved(), self.start.numel()
        A = self.start + moved[:first].view(self.start.shape)
        return Factors(A, moved[first:].view(weight.out_features, len(self.start)))


class _Moved(torch.autograd.Function):
    """x [N, I] -> x (W + λ P θ)ᵀ + bias [N, O]; W, λ and bias may be None.

    Saves x, θ, λ and the frozen W, but not P θ. The gradient of θ is λ Pᵀ(gᵀ x), and that of λ is ⟨gᵀ x, P θ⟩.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        theta: Tensor,
        scale: Tensor | None,
        frozen: Tensor | None,
        bias: Tensor | None,
        projection: Projection,
        shape: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(x, theta, scale, frozen)
        ctx.projection, ctx.shape = projection, shape
        return F.linear(x, _changed(projection.forward(theta).view(shape), scale, frozen).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, theta, scale, frozen = ctx.saved_tensors
        needs_x, needs_theta, needs_scale, _, needs_bias, *_ = ctx.needs_input_grad
        projection = ctx.projection
        moved = projection.forward(theta).view(ctx.shape) if needs_x or needs_scale else None
        g_x = g @ _changed(moved, scale, frozen).to(g.dtype) if needs_x and moved is not None else None
        g_theta = g_scale = None
        if needs_theta or needs_scale:
            whole_gradient = (g.t() @ x).to(theta.dtype)
            if needs_scale and moved is not None:
                g_scale = torch.dot(whole_gradient.view(-1), moved.view(-1)).to(scale.dtype)
            del moved
            g_theta = projection.adjoint(whole_gradient.view(-1)) if needs_theta else None
            g_theta = g_theta if scale is None or g_theta is None else scale * g_theta
        return g_x, g_theta, g_scale, None, g.sum(0) if needs_bias else None, None, None


def _changed(moved: Tensor, scale: Tensor | None, frozen: Tensor | None) -> Tensor:
    """W + λ P θ [O, I], from moved = P θ; W and λ may be None."""
    moved = moved if scale is None else scale * moved
    return moved if frozen is None else frozen + moved.to(frozen.dtype)
