"""Parameters that become smaller in training, and optimizer states that follow them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Cuts = Mapping[nn.Parameter, tuple[int, Tensor]]
"""Of each parameter, what is kept of one dimension: the dimension, and the indices [N] in ascending order."""


@runtime_checkable
class Shrinks(Protocol):
    """An optimizer whose states are not tensors beside the parameters, and which can narrow them itself."""

    def shrinking(self, cuts: Cuts) -> contextlib.AbstractContextManager[None]:
        """Within it the parameters become smaller; after it the states are those of what is left."""


def cannot_shrink(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> bool:
    """Whether the states of these parameters are anything but scalars and tensors of their parameter's shape."""
    if isinstance(optimizer, Shrinks):
        return False
    states = ((p, value) for p in parameters for value in optimizer.state.get(p, {}).values())
    return any(isinstance(value, Tensor) and value.ndim and value.shape != p.shape for p, value in states)


def shrink(cuts: Cuts, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Keep these parts of the parameters, which stay the same objects, and of their states. Gradients are dropped."""
    own = optimizer.shrinking(cuts) if isinstance(optimizer, Shrinks) else contextlib.nullcontext()
    with own, torch.no_grad():
        for parameter, (dim, index) in cuts.items():
            parameter.grad = None
            kept = parameter.data.index_select(dim, index)
            # A graph that is still held keeps the node that accumulates this gradient, with the shape of before. Torch
            # makes a new one when the dtype changes.
            parameter.data = kept.to(torch.float16 if kept.dtype != torch.float16 else torch.float32)
            parameter.data = kept
    if optimizer is None or isinstance(optimizer, Shrinks):
        return
    for parameter, (dim, index) in cuts.items():
        state = optimizer.state.get(parameter, {})
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim:
                state[name] = value.index_select(dim, index)
