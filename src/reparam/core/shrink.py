"""Shrink parameters during training, together with their optimizer states."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Cuts = Mapping[nn.Parameter, tuple[int, Tensor]]
"""For each parameter, the dimension that is cut and the indices [N] that are kept, in ascending order."""


@runtime_checkable
class Shrinks(Protocol):
    """An optimizer that does not keep its states as one tensor per parameter and can shrink them itself."""

    def shrinking(self, cuts: Cuts) -> contextlib.AbstractContextManager[None]:
        """A context in which the caller shrinks the parameters; on exit, the optimizer has shrunk their states too."""


def cannot_shrink(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> bool:
    """Whether any state tensor of these parameters is neither a scalar nor of its parameter's shape.

    Always False for an optimizer that `Shrinks`.
    """
    if isinstance(optimizer, Shrinks):
        return False
    states = ((p, value) for p in parameters for value in optimizer.state.get(p, {}).values())
    return any(isinstance(value, Tensor) and value.ndim and value.shape != p.shape for p, value in states)


def shrink(cuts: Cuts, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Cut the parameters in place (they stay the same objects) and their optimizer states; set gradients to None."""
    own = optimizer.shrinking(cuts) if isinstance(optimizer, Shrinks) else contextlib.nullcontext()
    with own, torch.no_grad():
        for parameter, (dim, index) in cuts.items():
            parameter.grad = None
            kept = parameter.data.index_select(dim, index)
            # A graph that is still alive keeps this parameter's gradient accumulator, which expects the old shape.
            # Changing the dtype makes torch create a new one.
            parameter.data = kept.to(torch.float16 if kept.dtype != torch.float16 else torch.float32)
            parameter.data = kept
    if optimizer is None or isinstance(optimizer, Shrinks):
        return
    for parameter, (dim, index) in cuts.items():
        state = optimizer.state.get(parameter, {})
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim:
                state[name] = value.index_select(dim, index)
