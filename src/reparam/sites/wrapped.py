"""Modules inside the wrappers of torch: compiled ones, DataParallel and DDP, and those with activation checkpointing.

A path never names a wrapper, so that an adapter has the same names on a wrapped model as on the bare one.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

_INNER = ("_orig_mod", "_checkpoint_wrapped_module")
"""What `torch.compile(module)` and torch's `CheckpointWrapper` call the module that they wrap."""

_IN_KEYS = {*_INNER, "_fsdp_wrapped_module"}
"""The names of wrapped modules in keys: also FSDP1's."""


def bare(module: nn.Module) -> nn.Module:
    """The module itself, without wrappers.

    >>> bare(nn.DataParallel(nn.Linear(2, 3)))
    Linear(in_features=2, out_features=3, bias=True)
    """
    while True:
        inner = next((module._modules[name] for name in _INNER if name in module._modules), None)
        if isinstance(module, DataParallel | DistributedDataParallel):
            inner = module.module
        if inner is None:
            return module
        module = inner


def bare_key(key: str) -> str:
    """The name of a tensor in the state dict of a wrapped model, as the bare model has it.

    `module.`, with which DataParallel and DDP begin all keys, is not removed: modules can have this name.

    >>> bare_key("model.layers.0._orig_mod.mlp.weight")
    'model.layers.0.mlp.weight'
    """
    return ".".join(part for part in key.split(".") if part not in _IN_KEYS)


def at(model: nn.Module, path: str) -> nn.Module:
    """The module at this path, without wrappers. Raises AttributeError if there is none."""
    module = bare(model)
    for name in path.split(".") if path else ():
        if (child := module._modules.get(name)) is None:
            raise AttributeError(f"{type(model).__name__} has no module {path}")
        module = bare(child)
    return module


def check_trainable(model: nn.Module) -> None:
    """Raise ValueError if new parameters of this model could not be trained."""
    if isinstance(model, DistributedDataParallel) and torch.distributed.get_world_size(model.process_group) > 1:
        raise ValueError(
            "the model is wrapped in DistributedDataParallel, which exchanges only the gradients of parameters that it "
            "was made with; put the adapter on the model first, and wrap it then"
        )
