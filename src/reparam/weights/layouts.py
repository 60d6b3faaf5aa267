"""How the tensors of a quantized weight are named in files and checked when they are read, by storage.

NF4 has the layout of bitsandbytes, int8 its own. Any other storage has the plain one: each parameter and buffer in the
state of its weight under `<path>.weight.<name>`. It is read into the weight that the storage makes of zeros, so that
whatever a weight is must follow from its shape, its storage's settings and these tensors.
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


class Layout(Protocol):
    """How the weights of one storage are in files."""

    def tensors_of_weight(self, weight: Any, path: str) -> dict[str, Tensor]:
        """The tensors of the module at `path`, by key."""

    def weight_from(self, state: Mapping[str, Tensor], path: str, shape: tuple[int, int]) -> Weight:
        """The weight of the module at `path`, which is to have this shape. Raises FormatError with the path."""


def layout_of(storage: Storage) -> Layout:
    """The storage's own layout, or the plain one."""
    return _Own(_OWN[storage.name]) if storage.name in _OWN else _Plain(storage)


def keys_in_files(storage: Storage) -> list[str]:
    """All keys that a weight may have in files, without its path; of other layouts too, so that they are refused."""
    keys = dict.fromkeys(key for module in _OWN.values() for key in module.KEYS)
    if storage.name not in _OWN:
        keys |= dict.fromkeys(f"weight.{name}" for name in storage.quantize(torch.zeros(128, 128)).state_dict())
    return list(keys)


@dataclasses.dataclass(frozen=True)
class _Own:
    """A layout that is written out in a file of this folder."""

    module: Any

    def tensors_of_weight(self, weight: Any, path: str) -> dict[str, Tensor]:
        return dict(self.module.tensors_of_weight(weight, path))

    def weight_from(self, state: Mapping[str, Tensor], path: str, shape: tuple[int, int]) -> Weight:
        weight: Weight = self.module.weight_from(state, path)
        return weight


@dataclasses.dataclass(frozen=True)
class _Plain:
    """Each tensor of the weight under its name."""

    storage: Storage

    def tensors_of_weight(self, weight: Any, path: str) -> dict[str, Tensor]:
        return {f"{path}.weight.{name}": tensor.detach() for name, tensor in weight.state_dict().items()}

    def weight_from(self, state: Mapping[str, Tensor], path: str, shape: tuple[int, int]) -> Weight:
        start = f"{path}.weight"
        found = {key.removeprefix(start + "."): value for key, value in state.items() if key.startswith(start)}
        device = next(iter(found.values())).device
        weight = self.storage.quantize(torch.zeros(shape, device=device))
        wanted = weight.state_dict()
        problems = [f"{start}.{name} is missing" for name in wanted if name not in found]
        problems += [f"{start}.{name} is not known" for name in found if name not in wanted]
        problems += [
            f"{start}.{name} is {_kind(found[name])}, expected {_kind(tensor)}"
            for name, tensor in wanted.items()
            if name in found and (found[name].dtype, found[name].shape) != (tensor.dtype, tensor.shape)
        ]
        if problems:
            raise FormatError(f"{start}: not a whole weight of the storage {self.storage.name}: {listed(problems)}")
        weight.load_state_dict(found, assign=True)
        for parameter in weight.parameters():
            parameter.requires_grad_(False)
        return weight


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype)[6:]} {list(tensor.shape)}"
