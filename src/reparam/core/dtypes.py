"""Rules for the dtype of a computation, and for tensors without values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product with input x: autocast's if autocast is on and x is not float64, else x's own."""
    device = x.device.type
    low = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if low else x.dtype


def wide(x: Tensor) -> Tensor:
    """x in float32, or in its own dtype if that is wider."""
    return x if x.dtype is torch.float32 else x.to(torch.promote_types(x.dtype, torch.float32))


def valueless(tensor: Tensor) -> bool:
    """Whether the tensor has a shape and no values: it is on `meta`, or fake, as `reparam plan` computes with."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def holds(condition: Tensor, *, unknown: bool) -> bool:
    """The value of a condition, a boolean tensor of one element; `unknown` for a tensor without values."""
    return unknown if valueless(condition) else bool(condition)
