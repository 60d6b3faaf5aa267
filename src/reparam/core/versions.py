"""Detect whether tensors have changed since something was computed from them.

Torch counts a tensor's in-place writes, but not all: writes through `.data`, through a numpy view and by fused kernels
are not counted, and a freed address can be used again. So what is small is compared by its bytes (`content`), and a
large frozen matrix by its address, its count of writes and a sample of its elements (`stamp_of` and `sample`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import torch
from torch import Tensor, nn

try:
    from xxhash import xxh3_64_intdigest as _digest
except ImportError:  # a tenth as fast
    from zlib import crc32 as _digest  # type: ignore[assignment]

Stamp = tuple[tuple[int, int, torch.dtype], ...]
SAMPLES = 1024
"""Elements of a tensor in its sample."""
_GOLDEN = 0.618  # successive places in a row are this share of its length apart, so that they cover all columns


def tensors_of(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a module and its children. (`module.parameters()` takes several times as long.)"""
    found: list[Tensor] = [tensor for tensor in module._parameters.values() if tensor is not None]
    if module._buffers:
        found += [tensor for tensor in module._buffers.values() if tensor is not None]
    for child in module._modules.values():
        if child is not None:
            found += tensors_of(child)
    return found


def stamp_of(tensors: Iterable[Tensor]) -> Stamp | None:
    """Address, count of writes and dtype of each tensor.

    None for tensors made under `torch.inference_mode`, whose writes are not counted.
    """
    try:
        return tuple([(t.data_ptr(), t._version, t.dtype) for t in tensors])
    except RuntimeError:  # checking each one first would be slower
        return None


def content(tensors: Iterable[Tensor]) -> tuple[int, ...] | None:
    """A checksum of the bytes of each tensor; None if a tensor has no bytes that can be read.

    >>> content([torch.zeros(3)]) == content([torch.zeros(3)]), content([torch.zeros(3)]) == content([torch.ones(3)])
    (True, False)
    """
    try:
        return tuple([_checksum(_local(t)) for t in tensors])
    except RuntimeError:
        return None


def sample(tensors: Iterable[Tensor]) -> tuple[int, ...] | None:
    """The same of `SAMPLES` elements of each tensor, evenly spread over its rows and columns."""
    try:
        return tuple([_checksum(_some(_local(t))) for t in tensors])
    except RuntimeError:
        return None


def _local(tensor: Tensor) -> Tensor:
    """The tensor, or this process's part of a sharded one."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _checksum(tensor: Tensor) -> int:
    """A checksum of the tensor's bytes. Raises RuntimeError for fake tensors, those of `torch.func`, freed storage."""
    own = tensor if tensor.device.type == "cpu" and tensor.is_contiguous() else tensor.detach().cpu().contiguous()
    address, size = own.data_ptr(), own.nbytes
    if not address:
        if size and not own.is_meta:
            raise RuntimeError("the tensor has no storage")
        return 0
    # `numpy()` would take as long, and torch would refuse to resize the storage afterwards, as FSDP does.
    return _digest((ctypes.c_ubyte * size).from_address(address))


def _some(tensor: Tensor) -> Tensor:
    if tensor.numel() <= SAMPLES:
        return tensor.reshape(-1)
    tensor = tensor.detach()
    if not tensor.is_contiguous():
        each = max(1, int(SAMPLES ** (1 / tensor.ndim)))
        return tensor[tuple(slice(None, None, -(-size // each)) for size in tensor.shape)].reshape(-1)
    step, width = tensor.numel() // SAMPLES, tensor.shape[-1]
    step += round(_GOLDEN * width) - step % width if step > width else 1 - step % 2
    return tensor.view(-1)[::step]
