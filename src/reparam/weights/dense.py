"""The plain storage: W [O, I] as it came, in its own dtype."""

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
    """W as it is; nothing to set."""

    def quantize(self, w: Tensor) -> DenseWeight:
        """Keep `w` [O, I] as it is; a parameter is taken over, not copied."""
        return DenseWeight(w)


def zero_weight(out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> DenseWeight:
    """A matrix of zeros, for what is computed without the base. It takes no memory: all entries are one number."""
    return DenseWeight(torch.zeros(1, 1, dtype=dtype).expand(out_features, in_features))


class DenseWeight(Weight):
    """W as one frozen parameter [O, I]."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.W = w if isinstance(w, nn.Parameter) else nn.Parameter(w)  # [O, I]; the same object keeps ties visible
        self.W.requires_grad_(False)
        self.out_features, self.in_features = w.shape

    @property
    def storage(self) -> Dense:
        """`Dense()`."""
        return Dense()

    @property
    def dense_or_none(self) -> Tensor:
        """W itself."""
        return self.W

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., I] -> x Wᵀ + bias [..., O]."""
        return F.linear(x, self.W, bias)

    def cast(self, x: Tensor) -> Tensor:
        """x in the dtype of W, unless autocast takes care of it.

        transformers keeps T5's `wo` in float32 in a 16-bit model, and casts for it only if `wo.weight` is a tensor.
        """
        if x.dtype is self.W.dtype or torch.is_autocast_enabled(x.device.type):
            return x
        return x.to(self.W.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """W[ids], [..., I]."""
        return F.embedding(ids, self.W)

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """Rows of W in float32; a view when W is float32."""
        return self.W.detach()[rows].float()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of W."""
        return self.W.dtype
