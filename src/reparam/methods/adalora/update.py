"""The AdaLoRA update of one site: P, λ and Q, and how their rank shrinks. Q is `A`, P is `B`, λ is `E`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from reparam.core.base import Factors, Role, Update, Weight
from reparam.core.shrink import shrink
from reparam.methods.lora import LoRAUpdate


class SVDUpdate(LoRAUpdate):
    """P [O, R], λ [R] and Q [R, I] of one site: float32 master weights, cast to the compute dtype in `forward`."""

    roles: ClassVar[Mapping[str, Role]] = {"A": "in", "B": "out", "E": "core"}

    def __init__(self, a: Tensor, b: Tensor, *, scale: float, dropout: float = 0.0) -> None:
        super().__init__(a, b, scale=scale, dropout=dropout)
        self.E = nn.Parameter(a.new_zeros(len(a)))  # [R]

    def weighed(self, h_t: Tensor) -> Tensor:
        """λ ∘ h_t [R, N]: each component of Q xᵀ times its λ."""
        return h_t * self.E.to(h_t.dtype)[:, None]

    def factors(self, weight: Weight) -> Factors:
        """The factors A = Q [R, I] and B = s · P Λ [O, R]."""
        return Factors(self.A, self.scale * self.B * self.E)

    def from_svd(self, u: Tensor, s: Tensor, vh: Tensor) -> dict[str, Tensor]:
        """Q = Vh [R, I], P = U [O, R] and λ = s / scale [R], whose update is U diag(s) Vh; P and Q are orthogonal."""
        return {"A": vh, "B": u, "E": s / self.scale}

    def fit(self, tensors: Mapping[str, Tensor]) -> None:
        """Shrink to the rank of these saved tensors, if it is lower."""
        saved = tensors.get("E")
        if saved is not None and saved.ndim == 1 and len(saved) < len(self.E):
            index = torch.arange(len(saved), device=self.E.device)
            shrink({parameter: (dim, index) for parameter, dim in self.parts()})

    def parts(self) -> tuple[tuple[nn.Parameter, int], ...]:
        """λ, Q and P, each with the dimension that indexes its components."""
        return (self.E, 0), (self.A, 0), (self.B, 1)


def components(update: Update) -> SVDUpdate:
    """The SVDUpdate of one site, with or without DoRA magnitudes around it."""
    part = update.low_rank_part()
    assert part is not None
    assert isinstance(part[0], SVDUpdate)
    return part[0]
