"""The dense storage: W [O, I] unchanged, in its own dtype."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.core.base import Storage, Weight
from reparam.core.registry import storage


@storage("dense")
@dataclasses.dataclass(frozen=True)
class Dense(Storage):
    """Configuration of the dense storage; it has no settings."""

    def quantize(self, w: Tensor) -> DenseWeight:
        """Wrap `w` [O, I] without copying it."""
        return DenseWeight(w)


def zero_weight(out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> DenseWeight:
    """A zero matrix [O, I], to compute an update without a base matrix. Its entries share one number in memory."""
    return DenseWeight(torch.zeros(1, 1, dtype=dtype).expand(out_features, in_features))


class DenseWeight(Weight):
    """A weight that is one frozen parameter W [O, I]."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.W = w if isinstance(w, nn.Parameter) else nn.Parameter(w)  # [O, I]; the same object, so ties are kept
        self.W.requires_grad_(False)
        self.out_features, self.in_features = w.shape

    @property
    def storage(self) -> Dense:
        """The configuration, `Dense()`."""
        return Dense()

    @property
    def dense_or_none(self) -> Tensor:
        """The parameter W [O, I]."""
        return self.W

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., I] -> x Wᵀ + bias [..., O]."""
        return F.linear(x, self.W, bias)

    def cast(self, x: Tensor) -> Tensor:
        """x in the dtype of W; under autocast, x unchanged.

        transformers keeps T5's `wo` in float32 in a 16-bit model, and casts its input only if `wo.weight` is a tensor.
        """
        if x.dtype is self.W.dtype or torch.is_autocast_enabled(x.device.type):
            return x
        return x.to(self.W.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """ids [...] -> the rows W[ids] [..., I]."""
        return F.embedding(ids, self.W)

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """These rows of W in float32 [rows, I]; a view if W is float32."""
        return self.W.detach()[rows].float()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of W."""
        return self.W.dtype
