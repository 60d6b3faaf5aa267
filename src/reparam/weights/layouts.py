"""File layouts of quantized weights, by storage: the names of their tensors and the checks on reading.

NF4 uses the layout of bitsandbytes, and int8 its own. Every other storage uses the plain layout: each entry of the
weight's state dict under `<path>.weight.<name>`. Reading loads these tensors into a weight that the storage makes from
zeros. The shape, the storage's settings and the tensors must therefore determine the weight completely.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from reparam.core.base import Storage, Weight
from reparam.core.checks import listed
from reparam.errors import FormatError
from reparam.weights import bitsandbytes, int8_files

_OWN: dict[str, Any] = {"nf4": bitsandbytes, "int8": int8_files}
QUANTIZED = frozenset(key for module in _OWN.values() for key in module.KEYS)
"""The keys that quantized matrices have in the files of reparam and bitsandbytes, without their path."""


class Layout(Protocol):
    """The file layout of one storage's weights."""

    def tensors_of_weight(self, weight: Any, path: str) -> dict[str, Tensor]:
        """The tensors of the module at `path`, by their keys in the file."""

    def weight_from(self, state: Mapping[str, Tensor], path: str, shape: tuple[int, int]) -> Weight:
        """Build the weight [O, I] of the module at `path`. Raises FormatError, naming the path, for invalid tensors."""


def layout_of(storage: Storage) -> Layout:
    """The layout of the storage: its own if it has one, else the plain layout."""
    return _Own(_OWN[storage.name]) if storage.name in _OWN else _Plain(storage)


def keys_in_files(storage: Storage) -> list[str]:
    """All keys that a weight may have in files, without its path.

    Keys of other layouts are included, so that such weights are recognized and refused.
    """
    keys = dict.fromkeys(key for module in _OWN.values() for key in module.KEYS)
    if storage.name not in _OWN:
        keys |= dict.fromkeys(f"weight.{name}" for name in storage.quantize(torch.zeros(128, 128)).state_dict())
    return list(keys)


@dataclasses.dataclass(frozen=True)
class _Own:
    """A layout that a module of this package implements."""

    module: Any

    def tensors_of_weight(self, weight: Any, path: str) -> dict[str, Tensor]:
        return dict(self.module.tensors_of_weight(weight, path))

    def weight_from(self, state: Mapping[str, Tensor], path: str, shape: tuple[int, int]) -> Weight:
        weight: Weight = self.module.weight_from(state, path)
        return weight


@dataclasses.dataclass(frozen=True)
class _Plain:
    """The plain layout: each tensor of the weight's state dict under its name."""

    storage: Storage

    def tensors_of_weight(self, weight: Any, path: str) -> dict[str, Tensor]:
        return {f"{path}.weight.{name}": tensor.detach() for name, tensor in weight.state_dict().items()}

    def weight_from(self, state: Mapping[str, Tensor], path: str, shape: tuple[int, int]) -> Weight:
        start = f"{path}.weight"
        found = {key.removeprefix(f"{start}."): value for key, value in state.items() if key.startswith(f"{start}.")}
        if start in state:  # a dense matrix beside the tensors, or in their place
            found["weight"] = state[start]
        device = next(iter(found.values())).device if found else torch.device("cpu")
        weight = self.storage.quantize(torch.zeros(shape, device=device))
        wanted = weight.state_dict()
        problems = [f"{start}.{name} is missing" for name in wanted if name not in found]
        problems += [f"{start}.{name} is unknown" for name in found if name not in wanted]
        problems += [
            f"{start}.{name} is {_kind(found[name])}, expected {_kind(tensor)}"
            for name, tensor in wanted.items()
            if name in found and (found[name].dtype, found[name].shape) != (tensor.dtype, tensor.shape)
        ]
        if problems:
            raise FormatError(f"{start}: not a complete weight of storage {self.storage.name}: {listed(problems)}")
        weight.load_state_dict(found, assign=True)
        for parameter in weight.parameters():
            parameter.requires_grad_(False)
        return weight


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype)[6:]} {list(tensor.shape)}"
