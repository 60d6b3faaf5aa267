"""Fingerprints of base models, cheap enough to compute at every save and load.

A fingerprint is a SHA-256 over the name and shape of every parameter and up to 256 of its elements, sampled at fixed
positions across the whole tensor. The elements are digested as bfloat16 and as float16, so that a model loaded in
another dtype than it was saved in still matches in one of the two. If all parameters are float32 or float64, they are
also digested as float32, and two such models are compared exactly. Matrices and all other parameters have separate
digests, because quantizing changes only the matrices; for a quantized matrix, its quantized tensors are digested.

A fingerprint detects another model, other sizes or names, and training of the whole model. It does not detect changes
of a few elements, such as some rows of an embedding, changes of buffers, or differences that a cast to another dtype
rounds away. Adapters on the model do not change it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from reparam.core.placing import value_of
from reparam.sites.experts import stacks_of
from reparam.sites.module import Adapted, Shared, is_quantized
from reparam.sites.replaced import Replaced
from reparam.sites.wrapped import bare

SAMPLES = 256
HALVES = (torch.bfloat16, torch.float16)


def fingerprint(model: nn.Module, *, without: Iterable[str] = (), stacks: bool = True) -> dict[str, str]:
    """Digests of the base model, ignoring adapters: "<group> as <dtype>" -> hexadecimal. Compare them with `agree`.

    `without` are paths of modules to leave out: an adapter that replaces a module does not depend on its values.
    `stacks=False` does not count the stacked weights of experts as matrices, as earlier releases did.
    """
    outside = tuple(f"{path}." for path in without)
    storages: set[str] = set()
    matrices: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for path, module in base_modules(model):
        if f"{path}.".startswith(outside):
            continue
        if is_quantized(module):
            storages.add(module.frozen.storage.name)
        for name, tensor, matrix in _digested(module):
            matrix = matrix and (stacks or tensor.ndim == 2)
            (matrices if matrix else rest)[f"{path}.{name}".lstrip(".")] = tensor
    groups = {f"matrices ({'+'.join(sorted(storages)) or 'dense'})": matrices, "rest": rest}
    return {
        f"{group} as {str(dtype).removeprefix('torch.')}": digest
        for group, members in groups.items()
        for dtype, digest in _digests(sorted(members.items(), key=lambda item: item[0])).items()
    }


def agree(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two fingerprints can be of the same base model.

    Every group that both contain must agree: in float32 if both have that digest, otherwise in bfloat16 or float16.
    """
    groups: dict[str, dict[str, bool]] = {}
    for key in one.keys() & other.keys():
        group, _, dtype = key.partition(" as ")
        groups.setdefault(group, {})[dtype] = one[key] == other[key]
    return all(found.get("float32", any(found.values())) for found in groups.values())


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base model's parameters, with the names and layout that they have without adapters."""
    for path, module in base_modules(model):
        for name, tensor in _own(module).items():
            yield f"{path}.{name}".lstrip("."), tensor


def all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base model's tensors, also quantized ones, with the names that they have without adapters."""
    for path, module in base_modules(model):
        for name, tensor, _ in _digested(module):
            yield f"{path}.{name}".lstrip("."), tensor


def _digested(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """The module's own tensors: name, tensor, and whether it is a matrix or part of a quantized one."""
    if not is_quantized(module):
        for name, tensor in _own(module).items():
            yield name, tensor, tensor.ndim == 2 or name in stacks_of(module)
        return
    for name, tensor in module.frozen.named_parameters():
        yield f"weight.{name}", tensor, True
    if module.bias is not None:
        yield "bias", module.bias, False


def _own(module: nn.Module) -> dict[str, Tensor]:
    if isinstance(module, Adapted):
        return module.stock()
    return {name: value_of(module, name) for name, _ in module.named_parameters(recurse=False)}  # type: ignore[misc]


def base_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The base model's modules by path, without those of adapters."""
    module = bare(module)
    if isinstance(module, Replaced):
        yield from base_modules(module.origin, path)
        return
    yield path, module
    if not isinstance(module, Adapted):
        for name, child in module.named_children():
            if not isinstance(child, Shared):
                yield from base_modules(child, f"{path}.{name}".lstrip("."))


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
    """Up to SAMPLES elements [n] of the tensor, without copying it. `places` caches the indices by size and device."""
    key = (tensor.numel(), tensor.device)
    if key not in places:
        places[key] = _places(tensor.numel()).to(tensor.device)
    if tensor.is_contiguous():
        return tensor.view(-1)[places[key]]
    return tensor[torch.unravel_index(places[key], tensor.shape)]


def _places(size: int) -> Tensor:
    """One index in each of SAMPLES equal intervals of range(size), at a varying position within the interval."""
    count = min(size, SAMPLES)
    k = torch.arange(count)
    start, end = k * size // max(count, 1), (k + 1) * size // max(count, 1)
    return start + (k * 2654435761) % (end - start).clamp(min=1)  # Knuth's multiplicative hash
