"""LoRA with a bias on its second factor, as PEFT's `lora_bias`.

    h = W₀ x + s · (B A x + c)        A [R, I] random, B [O, R] and c [O] zero

Adapters that were extracted from fully fine-tuned models need it. The layer's own bias, if there is one, stays frozen,
and merging adds s · c to it; a layer without a bias gets one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from reparam.core.base import Role, Site, Weight
from reparam.core.registry import method
from reparam.methods.lora import LoRA, LoRAUpdate


@method("lora_bias")
@dataclasses.dataclass(frozen=True)
class LoRABias(LoRA):
    """LoRA whose factor B has a bias (PEFT's `lora_bias`). Only linear maps; its settings are LoRA's.

    >>> import torch, reparam
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> adapter = reparam.attach(model, reparam.LoRABias(r=2), targets=["0"])
    >>> sum(p.numel() for p in adapter.parameters())  # R (I + O) + O
    34
    """

    ties: ClassVar[bool] = False
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"r": 4, "alpha": 8},)

    def unsupported_reason(self, site: Site) -> str | None:
        """The reason if the module is not a linear map."""
        return (
            None if site.kind == "linear" else f"a bias on LoRA's B needs a linear map, and this is one of {site.kind}"
        )

    def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> LoRABiasUpdate:
        """A new update: LoRA's factors, and c = 0."""
        plain = super().build(site, weight, shared)
        return LoRABiasUpdate(plain.A.detach(), plain.B.detach(), scale=plain.scale, dropout=plain.dropout)


class LoRABiasUpdate(LoRAUpdate):
    """LoRA's factors and the bias c [O] of B."""

    roles: ClassVar[Mapping[str, Role]] = {**LoRAUpdate.roles, "c": "core"}

    def __init__(self, a: Tensor, b: Tensor, *, scale: float, dropout: float = 0.0) -> None:
        super().__init__(a, b, scale=scale, dropout=dropout)
        self.c = nn.Parameter(b.new_zeros(len(b)))  # [O]

    def forward(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [..., I] -> x Wᵀ + bias + s (drop(x) Aᵀ Bᵀ + c) [..., O]."""
        moved = self.bias_delta() if bias is None else bias + self.bias_delta()
        return super().forward(x, weight, moved.to(x.dtype if bias is None else bias.dtype))

    def bias_delta(self) -> Tensor:
        """The change s · c [O] of the bias."""
        return self.scale * self.c
