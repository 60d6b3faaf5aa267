"""Quantize or dequantize the frozen matrices of a model, with or without adapters on them."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from reparam.adapter.selection import state_of
from reparam.core.base import Storage, Weight
from reparam.core.progress import tracked
from reparam.core.registry import STORAGES, find_storage
from reparam.core.surface import advice
from reparam.core.text import counted
from reparam.sites import targets as targets_
from reparam.sites.expert_paths import experts_with
from reparam.sites.experts import close_idle, opened, settle
from reparam.sites.module import Adapted, is_quantized
from reparam.sites.offloaded import check_placed
from reparam.sites.replaced import Replaced
from reparam.sites.walk import put, storages_in, tied, walk
from reparam.sites.wrapped import at, bare


@dataclasses.dataclass(frozen=True)
class QuantizedSite:
    """Sizes of one quantized matrix."""

    name: str
    """Path of the module."""
    entries: int
    """Number of entries, O · I."""
    bytes: int
    """Bytes in the quantized storage, including its statistics."""
    before: int
    """Bytes of a dense matrix of this shape and dtype."""


@dataclasses.dataclass(frozen=True)
class QuantizeReport:
    """The quantized matrices of a model with their sizes, and the larger tensors that are not quantized."""

    storage: Storage
    sites: tuple[QuantizedSite, ...]
    left: dict[str, int]
    """Size in bytes of each tensor of two or more dimensions that is not quantized, by path."""

    @property
    def bits(self) -> float:
        """Bits per quantized entry, including statistics."""
        return 8 * sum(site.bytes for site in self.sites) / max(1, sum(site.entries for site in self.sites))

    def _matrices(self) -> str:
        return counted(len(self.sites), "matrix", "matrices")

    def __repr__(self) -> str:
        before, after = sum(site.before for site in self.sites), sum(site.bytes for site in self.sites)
        sizes = f"{size(before)} -> {size(after)}, {self.bits:.4g} bits per entry"
        return f"QuantizeReport({self.storage.name}, {self._matrices()}, {sizes}, {len(self.left)} not quantized)"

    def __str__(self) -> str:
        settings = ", ".join(f"{key}={value}" for key, value in self.storage.settings().items())
        before, after = sum(site.before for site in self.sites), sum(site.bytes for site in self.sites)
        largest = sorted(self.left, key=lambda name: -self.left[name])
        more = f" and {len(largest) - 4} more" if len(largest) > 4 else ""
        left = f"; not quantized: {', '.join(largest[:4])}{more} ({size(sum(self.left.values()))})" if largest else ""
        return (
            f"quantized {self._matrices()} into {self.storage.name}{f' ({settings})' if settings else ''}: "
            f"{size(before)} -> {size(after)}, {self.bits:.4g} bits per entry{left if largest else ''}"
        )


@torch.no_grad()
def quantize(model: nn.Module, storage: str | Storage, *, targets: targets_.Targets = "all-linear") -> QuantizeReport:
    """Convert the frozen matrices that `targets` names to a storage, one at a time; their adapters do not change.

    `storage` is a name ("nf4", "int8", or "dense" to dequantize) or a configuration such as `NF4(block=128)`. `targets`
    are as in `attach`; the default leaves out the output head and the embeddings. Weights that cannot be quantized,
    such as fused experts, cause a warning and are listed in the report.

    Raises ValueError, before the model is changed, if the targets match nothing or a vector, or if a matrix is already
    quantized or tied. Also raises ValueError if the storage refuses a matrix, for example one with NaN; the matrices
    before it are then already converted.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    >>> str(quantize(model, "int8", targets="0"))
    'quantized 1 matrix into int8: 16 KiB -> 4.25 KiB, 8.5 bits per entry; not quantized: 1.weight (512 B)'
    """
    chosen = find_storage(storage)() if isinstance(storage, str) else storage
    model = bare(model)
    with opened(model):
        return _quantized(model, chosen, targets_.resolve(model, targets))


def _quantized(model: nn.Module, chosen: Storage, names: list[str]) -> QuantizeReport:
    check_placed(model, names, "quantize")
    _check(model, names, chosen)
    sites = []
    holders = {path: experts_with(model, path) for path in names}
    left = Counter(holders.values())
    for path in tracked(names, f"quantizing into {chosen.name}", unit="matrices"):
        module = _requantized(path, at(model, path), chosen)
        sites.append(_site(path, module.frozen))
        plain = module.frozen.dense_or_none is not None and not module.updates
        put(model, {path: module.restore() if plain else module})
        left[holders[path]] -= 1
        if (holder := holders[path]) is not None and not left[holder]:  # so that its dense weights are released
            settle(holder)
    close_idle(model)
    if hasattr(model, "reparam_state"):
        state_of(model).refresh()
    describe(model)
    return QuantizeReport(chosen, tuple(sites), dict(_left(model)))


def pack(model: nn.Module, storage: str | Storage, *, targets: targets_.Targets = "all-linear") -> QuantizeReport:
    """Deprecated alias of `quantize`, to be removed in the next release. Issues a FutureWarning."""
    warnings.warn("reparam.pack is now reparam.quantize; the next release removes the old name", FutureWarning, 2)
    return quantize(model, storage, targets=targets)


METHOD = "reparam"
"""The `quant_method` of our quantized models in `config.json`."""


def entry_of(storage: Storage, targets: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` in `config.json` of a model with these matrices in a storage."""
    return {"quant_method": METHOD, "storage": storage.name, **storage.settings(), "targets": list(targets)}


def usual_targets(model: nn.Module) -> list[str]:
    """The quantized matrices: "all-linear" where that names exactly these, else their paths."""
    held = storages_in(model)
    with warnings.catch_warnings():  # matrices that cannot be quantized were reported when the others were
        warnings.simplefilter("ignore")
        usual = targets_.resolve(model, "all-linear")
    return ["all-linear"] if set(usual) == set(held) else list(held)


def describe(model: nn.Module) -> None:
    """Let the configuration of a transformers model say what is quantized in it now, so that its files can be read.

    A model that transformers quantized while loading it does that itself when it is saved.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "save_pretrained") or getattr(model, "hf_quantizer", None) is not None:
        return
    held = set(storages_in(model).values())
    if len(held) == 1:
        config.quantization_config = entry_of(held.pop(), usual_targets(model))
    elif held:
        names = "+".join(sorted(storage.name for storage in held))
        config.quantization_config = {"quant_method": METHOD, "storage": names}
    elif hasattr(config, "quantization_config"):
        del config.quantization_config


def reports(model: nn.Module) -> list[QuantizeReport]:
    """Report the quantized matrices of a model, one report per storage; empty if all matrices are dense."""
    held: dict[Storage, list[QuantizedSite]] = {}
    for path, storage in storages_in(model).items():
        held.setdefault(storage, []).append(_site(path, at(model, path).frozen))  # type: ignore[arg-type]
    left = dict(_left(model))
    return [QuantizeReport(storage, tuple(sites), left) for storage, sites in held.items()]


def entries(model: nn.Module) -> int:
    """Number of parameters of a model, where a quantized matrix counts as its O · I entries."""
    quantized = [module.frozen for _, module in walk(model) if is_quantized(module)]
    stored = sum(p.numel() for weight in quantized for p in weight.parameters())
    meant = sum(weight.out_features * weight.in_features for weight in quantized)
    return sum(p.numel() for p in model.parameters()) - stored + meant


def size(count: float) -> str:
    """Format a number of bytes with a binary unit, B to GiB.

    >>> size(1536)
    '1.5 KiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def _requantized(path: str, found: nn.Module, storage: Storage) -> Adapted:
    """Wrap the module and convert its matrix to the storage. If the storage raises ValueError, undo the wrapping."""
    trains = isinstance(found, Adapted) or bool(found.weight.requires_grad)
    module = targets_.wrap(found)
    try:
        weight = storage.quantize(module.frozen.tensor())
    except ValueError as error:
        if module is not found:  # wrapping froze the matrix, and transposed it if the module is a Conv1D
            module.restore().get_parameter("weight").requires_grad_(trains)
        raise ValueError(f"{path}: {error}") from error
    module.hold(weight)
    return module


def _check(model: nn.Module, names: list[str], storage: Storage) -> None:
    """Raise ValueError for tied weights, vectors, and matrices that are already quantized."""
    problems = []
    for path, others in tied(model, names).items():
        remedy = advice("call reparam.untie(model) or leave it out", "leave it out")
        problems.append(f"{path} shares its weight with {', '.join(others)}; {remedy}")
    vectors = [path for path in names if not targets_.is_matrix(at(model, path))]
    problems += [f"{path} is a vector, not a matrix" for path in vectors]
    held = storages_in(model)
    dense = STORAGES["dense"]
    for path in names if not isinstance(storage, dense) else ():
        if path in held:
            problems.append(f"{path} is {held[path].name} already, and quantizing again adds error; load the original")
    if problems:
        raise ValueError(
            "quantize: " + "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" * (len(problems) > 5))
        )


def _left(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield path and bytes of each dense tensor of two or more dimensions; tied tensors count once."""
    seen: set[tuple[int, torch.Size]] = set()
    for path, module in (("", model), *walk(model)):
        holder = module.origin if isinstance(module, Replaced) else module
        own = holder.named_parameters(recurse=holder is not module)
        if isinstance(module, Adapted):
            stock = {} if module.frozen.dense_or_none is None else module.stock()
            own = ((name, tensor) for name, tensor in stock.items() if name == "weight")  # type: ignore[misc]
        for name, tensor in own:
            key = (id(tensor) if tensor.is_meta else tensor.data_ptr(), tensor.shape)
            if tensor.ndim >= 2 and key not in seen:
                seen.add(key)
                yield f"{path}.{name}".lstrip("."), tensor.nbytes


def _site(path: str, weight: Weight) -> QuantizedSite:
    entries = weight.out_features * weight.in_features
    return QuantizedSite(path, entries, sum(t.nbytes for t in weight.held()), entries * weight.dtype.itemsize)
