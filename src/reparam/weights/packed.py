"""What packed storages have in common: how float32 statistics are kept, how a dtype is remembered, what is refused."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reparam.base import Weight

PACKABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGEST = 2.0**100
"""About 1e30. Beyond it the sums and products that statistics are made of can overflow float32."""


class PackedWeight(Weight):
    """A weight of whole numbers. Its results have the dtype that the matrix had, or that the model was moved to since.

    Statistics in float32 are kept as the bits of int32, because `.to(bfloat16)`, `.half()` and mixed-precision
    policies round every floating-point tensor that they find.
    """

    like: Tensor

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        # No entries; it is there because `model.to(dtype)` changes its dtype, and so says what results are to be.
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrix that was packed, or the one that the model was moved to."""
        return self.like.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """O and I."""
        return self.out_features, self.in_features


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter that never trains."""
    return nn.Parameter(tensor, requires_grad=False)


def bits(statistics: Tensor) -> nn.Parameter:
    """float32 as a frozen parameter of int32."""
    return frozen(statistics.contiguous().view(torch.int32))


def floats(stored: Tensor) -> Tensor:
    """The float32 that `bits` stored; a view."""
    return stored.view(torch.float32)


def check_packable(w: Tensor, storage: str) -> None:
    """Raise ValueError unless `w` is a matrix of finite floating-point numbers with entries."""
    if w.ndim != 2 or w.dtype not in PACKABLE or not w.numel():
        raise ValueError(
            f"{storage}: expected a matrix of floating-point numbers with entries, got {str(w.dtype)[6:]} "
            f"{list(w.shape)}" + ("; is it packed already?" if w.dtype not in PACKABLE else "")
        )
    if not w.is_meta and not float(w.detach().abs().amax()) <= LARGEST:
        place = [int(i) for i in (~(w.detach().abs().float() <= LARGEST)).nonzero()[0]]
        raise ValueError(
            f"{storage}: the matrix holds NaN, infinity or numbers beyond 1e30 (first at {place}), which would spoil "
            f"their whole block"
        )
