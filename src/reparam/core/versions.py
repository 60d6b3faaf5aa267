"""Telling whether tensors have changed since something was computed from them, without reading them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

Stamp = tuple[tuple[int, int, torch.dtype], ...]


def stamp(module: nn.Module) -> Stamp | None:
    """What changes when a tensor of the module is written to or exchanged: address, version and dtype of each.

    None where that cannot be told, for tensors made under `torch.inference_mode`. Writing through `.data` is not seen.
    """
    found = stamp_of(t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)
    for child in module._modules.values():
        if found is None or (inner := () if child is None else stamp(child)) is None:
            return None
        found += inner
    return found


def stamp_of(tensors: Iterable[Tensor]) -> Stamp | None:
    """As `stamp`, of some tensors."""
    try:
        return tuple([(t.data_ptr(), t._version, t.dtype) for t in tensors])
    except RuntimeError:  # inference tensors have no version; to ask each takes longer
        return None


class Steps:
    """How many optimizer steps this process has made. Fused kernels write to parameters past their version counters."""

    count = 0

    @classmethod
    def note(cls, *_: object) -> None:
        """Called after each step of any optimizer."""
        cls.count += 1


register_optimizer_step_post_hook(Steps.note)
