"""Detect, without reading them, whether tensors have changed since something was computed from them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

Stamp = tuple[tuple[int, int, torch.dtype], ...]


def stamp(module: nn.Module) -> Stamp | None:
    """Address, version counter and dtype of each tensor of the module: they change when one is written or replaced.

    None for tensors made under `torch.inference_mode`, which have no version. Writes through `.data` are not detected.
    """
    found = stamp_of(t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)
    for child in module._modules.values():
        if found is None or (inner := () if child is None else stamp(child)) is None:
            return None
        found += inner
    return found


def stamp_of(tensors: Iterable[Tensor]) -> Stamp | None:
    """The same as `stamp`, for a group of tensors."""
    try:
        return tuple([(t.data_ptr(), t._version, t.dtype) for t in tensors])
    except RuntimeError:  # inference tensors have no version; checking each one first would be slower
        return None


class Steps:
    """Counts the optimizer steps of this process. Fused kernels do not increment parameters' versions."""

    count = 0

    @classmethod
    def note(cls, *_: object) -> None:
        """Add one to the count; torch calls it after each step of any optimizer."""
        cls.count += 1


register_optimizer_step_post_hook(Steps.note)
