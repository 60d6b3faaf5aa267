"""P, λ and Q of one site, and how they become smaller."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from reparam.core.base import Factors, Role, Update, Weight
from reparam.core.shrink import shrink
from reparam.methods.lora import LoRAUpdate


class SVDUpdate(LoRAUpdate):
    """P, λ and Q of one site, as float32 masters that are cast to the compute dtype at use."""

    roles: ClassVar[Mapping[str, Role]] = {"A": "in", "B": "out", "E": "core"}

    def __init__(self, a: Tensor, b: Tensor, *, scale: float, dropout: float = 0.0) -> None:
        super().__init__(a, b, scale=scale, dropout=dropout)
        self.E = nn.Parameter(a.new_zeros(len(a)))  # [R]

    def weighed(self, h_t: Tensor) -> Tensor:
        """λ ∘ h_t [R, N]."""
        return h_t * self.E.to(h_t.dtype)[:, None]

    def factors(self, weight: Weight) -> Factors:
        """Q, and s · P Λ."""
        return Factors(self.A, self.scale * self.B * self.E)

    def from_svd(self, u: Tensor, s: Tensor, vh: Tensor) -> dict[str, Tensor]:
        """Q = Vh, P = U and Λ = s / scale, so that P and Q are orthogonal."""
        return {"A": vh, "B": u, "E": s / self.scale}

    def fit(self, tensors: Mapping[str, Tensor]) -> None:
        """Have the rank that these tensors have, if it is a lower one."""
        saved = tensors.get("E")
        if saved is not None and saved.ndim == 1 and len(saved) < len(self.E):
            index = torch.arange(len(saved), device=self.E.device)
            shrink({parameter: (dim, index) for parameter, dim in self.parts()})

    def parts(self) -> tuple[tuple[nn.Parameter, int], ...]:
        """Each parameter, and which of its dimensions counts components."""
        return (self.E, 0), (self.A, 0), (self.B, 1)


def components(update: Update) -> SVDUpdate:
    """The components of one site, under magnitudes or without."""
    part = update.low_rank_part()
    assert part is not None
    assert isinstance(part[0], SVDUpdate)
    return part[0]
