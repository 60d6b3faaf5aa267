"""Telling one base model from another, cheaply enough for every save and load.

A fingerprint is a SHA-256 over every tensor's name, shape and up to 256 evenly spaced elements rounded to bfloat16, so
that the dtype a model is loaded in does not matter. Any training of the whole model changes it; an edit of single
weights may not. Matrices under adapters are digested apart from the rest ("sites" and "rest"), because a packed
storage changes the former and not the latter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from reparam.base import storage_name
from reparam.linear import Adapted, Replaced

SAMPLES = 256


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Digests of the base under any adapters: of its matrices, by the storage they are in, and of everything else."""
    matrices, rest = hashlib.sha256(), hashlib.sha256()
    storages = {storage_name(m.weight) for m in model.modules() if isinstance(m, Adapted)} - {"dense"}
    for name, tensor in sorted(base_tensors(model)):
        digest = matrices if tensor.ndim == 2 else rest
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(_sample(tensor))
    return {f"matrices ({'+'.join(sorted(storages)) or 'dense'})": matrices.hexdigest(), "rest": rest.hexdigest()}


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base model's parameters under the names and in the layout that they have without adapters."""
    for path, module in _base_modules(model, ""):
        own = module.stock() if isinstance(module, Adapted) else dict(module.named_parameters(recurse=False))
        for name, tensor in own.items():
            yield f"{path}.{name}".lstrip("."), tensor


def _base_modules(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, Replaced):
        yield from _base_modules(module.origin, path)
        return
    yield path, module
    if not isinstance(module, Adapted):
        for name, child in module.named_children():
            yield from _base_modules(child, f"{path}.{name}".lstrip("."))


def _sample(tensor: Tensor) -> bytes:
    count = min(tensor.numel(), SAMPLES)
    index = torch.arange(count, device=tensor.device) * tensor.numel() // max(count, 1)
    places = torch.unravel_index(index, tensor.shape) if tensor.ndim else ()
    found = tensor.detach()[places].to(torch.bfloat16).cpu().reshape(-1)
    return found.view(torch.int16).numpy().tobytes()
