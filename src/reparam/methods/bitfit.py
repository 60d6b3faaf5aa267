"""BitFit: biases alone train (Ben Zaken, Ravfogel & Goldberg 2021, arXiv 2106.10199, §3).

    h = W x + b + δ        δ [O] zero at first, for every linear map and norm that has a bias

Llama and its kin have no biases, and nothing would train. `create` gives their linear maps one, which the paper has no
results for; merged models then hold tensors that their classes do not read from files, and are refused by `reparam
merge`.
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


@method("bitfit")
@dataclasses.dataclass(frozen=True)
class BitFit(Method):
    """Configuration of BitFit.

    >>> BitFit().unsupported_reason(Site("q_proj", "linear", 8, 8))
    'this layer has no bias; pass --method.create to add one'
    >>> import torch, reparam
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> adapter = reparam.attach(model, reparam.BitFit(), targets=["0"])
    >>> sum(p.numel() for p in adapter.parameters())  # a change of each entry of the bias
    6
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"create": True},)

    create: bool = False
    """Give linear maps that have no bias one."""

    @property
    def default_targets(self) -> tuple[str, ...]:
        """Whatever has a bias."""
        return ("everything",)

    def unsupported_reason(self, site: Site) -> str | None:
        """Only what has a bias, or can be given one."""
        if site.bias or (self.create and site.kind == "linear"):
            return None
        if site.kind == "linear":
            return "this layer has no bias; pass --method.create to add one"
        return f"this {site.kind} has no bias"

    def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> BitFitUpdate:
        """A change of nothing."""
        return BitFitUpdate(torch.zeros(site.out_features, device=weight.device))


class BitFitUpdate(Update):
    """The change of one bias, as a float32 master."""

    roles: ClassVar[Mapping[str, Role]] = {"delta": "core"}

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.delta = nn.Parameter(delta)  # [O]

    def forward(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [..., I] -> x Wᵀ + bias + δ [..., O]."""
        moved = self.delta if bias is None else bias + self.delta
        return weight(x, moved.to(x.dtype if bias is None else bias.dtype))

    def factors(self, weight: Weight) -> Factors:
        """None of the matrix changes: rank 0."""
        return Factors(self.delta.new_zeros(0, weight.in_features), self.delta.new_zeros(weight.out_features, 0))

    def bias_delta(self) -> Tensor:
        """δ."""
        return self.delta
