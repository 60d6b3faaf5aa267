"""BitFit: trains only the biases (Ben Zaken, Ravfogel & Goldberg 2021, arXiv 2106.10199, §3).

    h = W x + b + δ        δ [O] zero at first, for every linear layer and norm that has a bias

Llama and similar models have no biases, so that nothing would train. `create` adds a bias to their linear layers, for
which the paper has no results. `reparam merge` refuses such an adapter, because the model's class does not load the new
biases from files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from reparam.core.base import Factors, Role, Site, Update, Weight
from reparam.core.method import Method
from reparam.core.registry import method
from reparam.core.surface import advice


@method("bitfit")
@dataclasses.dataclass(frozen=True)
class BitFit(Method):
    """BitFit (Ben Zaken et al. 2021, arXiv 2106.10199): trains only the biases.

    >>> BitFit().unsupported_reason(Site("q_proj", "linear", 8, 8))
    'this layer has no bias; set create=True to add one'
    >>> import torch, reparam
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> adapter = reparam.attach(model, reparam.BitFit(), targets=["0"])
    >>> sum(p.numel() for p in adapter.parameters())  # a change of each entry of the bias
    6
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"create": True},)

    create: bool = False
    """Add a bias to linear layers that have none."""

    @property
    def default_targets(self) -> tuple[str, ...]:
        """The whole model; layers without a bias are skipped."""
        return ("everything",)

    def unsupported_reason(self, site: Site) -> str | None:
        """The reason if the layer has no bias and `create` does not add one; else None."""
        if site.bias or (self.create and site.kind == "linear"):
            return None
        if site.kind == "linear":
            return f"this layer has no bias; {advice('set create=True', 'pass --method.create')} to add one"
        return f"this {site.kind} has no bias"

    def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> BitFitUpdate:
        """A new update with δ = 0."""
        return BitFitUpdate(torch.zeros(site.out_features, device=weight.device))


class BitFitUpdate(Update):
    """The change δ [O] of one bias, in float32."""

    roles: ClassVar[Mapping[str, Role]] = {"delta": "core"}

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.delta = nn.Parameter(delta)  # [O]

    def forward(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [..., I] -> x Wᵀ + bias + δ [..., O]."""
        moved = self.delta if bias is None else bias + self.delta
        return weight(x, moved.to(x.dtype if bias is None else bias.dtype))

    def factors(self, weight: Weight) -> Factors:
        """Factors of rank 0: the weight matrix does not change."""
        return Factors(self.delta.new_zeros(0, weight.in_features), self.delta.new_zeros(weight.out_features, 0))

    def bias_delta(self) -> Tensor:
        """The change δ [O] of the bias."""
        return self.delta
