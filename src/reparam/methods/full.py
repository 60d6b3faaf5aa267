"""Full fine-tuning: trains every entry of the weights. It is the baseline for other methods.

    h = W' x + b'        W' [O, I] a float32 copy of W, b' [O] a copy of the bias if there is one

With the default targets, "everything", these are all parameters of the model except tied matrices, and AdamW makes the
same steps as on the model's own parameters. The copy of a quantized W starts at the dequantized values; the quantized W
stays in memory.

Its `Factors` are ΔW and an identity: exact in float32, but not of low rank. In a mixed batch, each adapter takes the
memory of two matrices.

Shapes: O out_features, I in_features, R = min(O, I).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.core.base import Factors, Role, Site, Update, Weight
from reparam.core.dtypes import wide
from reparam.core.method import Method
from reparam.core.registry import method


@method("full")
@dataclasses.dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning: trains every entry of the weights and biases. It has no settings.

    >>> Full().default_targets
    ('everything',)
    >>> import torch, reparam
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> adapter = reparam.attach(model, reparam.Full(), targets=["0"])
    >>> sum(p.numel() for p in adapter.parameters())  # W' [6, 8] and b' [6]
    54
    """

    biases: ClassVar[bool] = True
    ties: ClassVar[bool] = True

    @property
    def default_targets(self) -> tuple[str, ...]:
        """All linear layers, embeddings and norms."""
        return ("everything",)

    def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> FullUpdate:
        """A new update: a copy of W [O, I], dequantized if W is quantized."""
        return FullUpdate(_stored(weight).clone())


class FullUpdate(Update):
    """W' [O, I] of one site: a float32 master weight, cast to the compute dtype in `forward`."""

    roles: ClassVar[Mapping[str, Role]] = {"matrix": "core"}

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)  # [O, I]

    def forward(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [..., I] -> x W'ᵀ + bias [..., O]."""
        return F.linear(x, self.matrix.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def factors(self, weight: Weight) -> Factors:
        """W' − W [O, I] and an identity, as factors."""
        return of_matrix(self.matrix - _stored(weight).to(self.matrix.dtype))

    def effective_weight(self, weight: Weight) -> Tensor:
        """The parameter W' [O, I] itself."""
        return self.matrix

    def rows(self, ids: Tensor, weight: Weight) -> Tensor:
        """ids [...] -> rows of W' [..., I]."""
        return F.embedding(ids, self.matrix).to(weight.dtype)


def of_matrix(change: Tensor) -> Factors:
    """ΔW [O, I] and an identity [R, R] as factors.

    The gain of ones marks the change as not of low rank, for code that rounds or describes it.
    """
    eye = torch.eye(min(change.shape), dtype=change.dtype, device=change.device)
    ones = change.new_ones(len(change))
    return Factors(eye, change, ones) if len(eye) == change.shape[1] else Factors(change, eye, ones)


def _stored(weight: Weight) -> Tensor:
    """W [O, I] in float32 or wider. It may be the stored tensor itself: do not write to it."""
    if weight.dense_or_none is None:
        return weight.dense()
    return wide(weight.dense_or_none.detach())
