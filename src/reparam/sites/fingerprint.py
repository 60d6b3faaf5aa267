"""Telling one base model from another, cheaply enough for every save and load.

A fingerprint is a SHA-256 over every parameter's name, shape and up to 256 of its elements, taken at fixed places that
are spread over the whole tensor. The elements are digested as bfloat16 and as float16, so that a model which is loaded
in another dtype than it was saved in agrees in one of the two; where all are float32, also as that, and two such models
are compared exactly. Matrices and the rest are digested apart, because a quantized storage changes the former alone; of
a quantized matrix, the quantized tensors are digested.

It catches another model, other sizes or names, and any training of the whole model. It does not see a change of a few
elements, such as some rows of an embedding, nor buffers; nor, between dtypes, what rounding hides. It is the same with
and without adapters on the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from reparam.sites.module import Adapted, Replaced, Shared, is_quantized

SAMPLES = 256
HALVES = (torch.bfloat16, torch.float16)


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Digests of the base under any adapters: `<group> as <dtype>` -> hexadecimal; compare with `agree`."""
    storages: set[str] = set()
    matrices: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for path, module in _base_modules(model, ""):
        if is_quantized(module):
            storages.add(module.frozen.storage.name)
        for name, tensor, matrix in _digested(module):
            (matrices if matrix else rest)[f"{path}.{name}".lstrip(".")] = tensor
    groups = {f"matrices ({'+'.join(sorted(storages)) or 'dense'})": matrices, "rest": rest}
    return {
        f"{group} as {str(dtype).removeprefix('torch.')}": digest
        for group, members in groups.items()
        for dtype, digest in _digests(sorted(members.items(), key=lambda item: item[0])).items()
    }


def agree(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two fingerprints can be of the same base: each group that both have agrees, in float32 or in a half."""
    groups: dict[str, dict[str, bool]] = {}
    for key in one.keys() & other.keys():
        group, _, dtype = key.partition(" as ")
        groups.setdefault(group, {})[dtype] = one[key] == other[key]
    return all(found.get("float32", any(found.values())) for found in groups.values())


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base model's parameters under the names and in the layout that they have without adapters."""
    for path, module in _base_modules(model, ""):
        for name, tensor in _own(module).items():
            yield f"{path}.{name}".lstrip("."), tensor


def _digested(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Name, tensor, and whether it is a matrix or a part of a quantized one, of what this module holds itself."""
    if not is_quantized(module):
        for name, tensor in _own(module).items():
            yield name, tensor, tensor.ndim == 2
        return
    for name, tensor in module.frozen.named_parameters():
        yield f"weight.{name}", tensor, True
    if module.bias is not None:
        yield "bias", module.bias, False


def _own(module: nn.Module) -> dict[str, Tensor]:
    return module.stock() if isinstance(module, Adapted) else dict(module.named_parameters(recurse=False))


def _base_modules(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, Replaced):
        yield from _base_modules(module.origin, path)
        return
    yield path, module
    if not isinstance(module, Adapted):
        for name, child in module.named_children():
            if not isinstance(child, Shared):
                yield from _base_modules(child, f"{path}.{name}".lstrip("."))


def _digests(tensors: list[tuple[str, Tensor]]) -> dict[torch.dtype, str]:
    names = "".join(f"{name}{list(tensor.shape)}" for name, tensor in tensors).encode()
    places: dict[tuple[int, torch.device], Tensor] = {}
    samples = [_sample(tensor.detach(), places).float().cpu() for _, tensor in tensors]
    values = torch.cat(samples) if samples else torch.zeros(0)
    single = all(tensor.dtype in (torch.float32, torch.float64) for _, tensor in tensors)
    return {
        dtype: hashlib.sha256(names + values.to(dtype).view(torch.uint8).numpy().tobytes()).hexdigest()
        for dtype in ((torch.float32, *HALVES) if single else HALVES)
    }


def _sample(tensor: Tensor, places: dict[tuple[int, torch.device], Tensor]) -> Tensor:
    """Up to SAMPLES elements [n] of the tensor, which is not copied. `places` caches indices by size."""
    key = (tensor.numel(), tensor.device)
    if key not in places:
        places[key] = _places(tensor.numel()).to(tensor.device)
    if tensor.is_contiguous():
        return tensor.view(-1)[places[key]]
    return tensor[torch.unravel_index(places[key], tensor.shape)]


def _places(size: int) -> Tensor:
    """One index in each of SAMPLES equal stretches of range(size), not always at the same place in it."""
    count = min(size, SAMPLES)
    k = torch.arange(count)
    start, end = k * size // max(count, 1), (k + 1) * size // max(count, 1)
    return start + (k * 2654435761) % (end - start).clamp(min=1)  # Knuth's multiplicative hash
