"""Full fine-tuning: every entry of W' trains, from W on. What other methods are measured against.

    h = W' x + b'        W' [O, I] a float32 copy of W, b' one of the bias where there is one

Over "everything", its usual targets, these are all parameters of a model but those of tied matrices, so that AdamW
makes the steps that it makes on the model's own parameters. A quantized W begins at its dequantized values, and stays
beside W'.

Its `Factors` are ΔW times an identity, which is exact in float32 and of no low rank: a mixed batch takes the memory of
two matrices for each adapter.

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
    """Configuration of full fine-tuning: there is nothing to set.

    >>> Full().default_targets
    ('everything',)
    >>> import torch, reparam
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> adapter = reparam.attach(model, reparam.Full(), targets=["0"])
    >>> sum(p.numel() for p in adapter.parameters())  # W' [6, 8] and b' [6]
    54
    """

    biases: ClassVar[bool] = True

    @property
    def default_targets(self) -> tuple[str, ...]:
        """All linear maps, embeddings and norms."""
        return ("everything",)

    def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> FullUpdate:
        """A copy of W."""
        return FullUpdate(_stored(weight).clone())


class FullUpdate(Update):
    """W' of one site, as a float32 master that is cast to the compute dtype at use."""

    roles: ClassVar[Mapping[str, Role]] = {"matrix": "core"}

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)  # [O, I]

    def forward(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [..., I] -> x W'ᵀ + bias [..., O]."""
        return F.linear(x, self.matrix.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def factors(self, weight: Weight) -> Factors:
        """W' - W, and an identity."""
        return of_matrix(self.matrix - _stored(weight).to(self.matrix.dtype))

    def effective_weight(self, weight: Weight) -> Tensor:
        """W' itself."""
        return self.matrix

    def rows(self, ids: Tensor, weight: Weight) -> Tensor:
        """ids [...] -> rows of W' [..., I]."""
        return F.embedding(ids, self.matrix).to(weight.dtype)


def of_matrix(change: Tensor) -> Factors:
    """ΔW [O, I] and an identity [R, R] as factors.

    The gain of ones beside them tells those who round or describe the change that its rank is not low.
    """
    eye = torch.eye(min(change.shape), dtype=change.dtype, device=change.device)
    ones = change.new_ones(len(change))
    return Factors(eye, change, ones) if len(eye) == change.shape[1] else Factors(change, eye, ones)


def _stored(weight: Weight) -> Tensor:
    """W [O, I] in float32 or more; it may be the stored tensor itself."""
    if weight.dense_or_none is None:
        return weight.dense()
    return wide(weight.dense_or_none.detach())
