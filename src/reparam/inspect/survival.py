"""Which share of ΔW a merge would keep, before it is made, by the storage that it would be written to.

    ⟨written - W, ΔW⟩ / ⟨ΔW, ΔW⟩        as `merge` reports it; 1 is everything

For each site and storage W is first put into that storage, as a base that is loaded in it is, and ΔW is then folded
in: in bfloat16 and float16 by one rounding, in quantized storages by `nearest` or by `aware` (`weights/rounding.py`).
One site at a time; nothing is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from reparam.adapter.merge import SiteMerge, fold, measured
from reparam.adapter.updates import update_of
from reparam.core.base import Weight
from reparam.core.registry import STORAGES
from reparam.io.record import Record
from reparam.weights.dense import DenseWeight
from reparam.weights.quantized import ROUNDINGS

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def kinds() -> list[str]:
    """What `survivals` covers: bfloat16, float16, and each quantized storage by each rounding, as "int8 nearest"."""
    quantized = [name for name in STORAGES if name != "dense"]
    return [*DTYPES, *(f"{name} {rounding}" for name in quantized for rounding in reversed(ROUNDINGS))]


@torch.no_grad()
def survivals(record: Record, name: str, weight: Weight) -> dict[str, SiteMerge]:
    """What merging one site of a saved adapter into `weight`, its frozen matrix, would keep, by `kinds`.

    Storages that cannot hold the matrix are left out: float16 where an entry is too large, quantized ones for
    embeddings and vectors, which are not quantized, and those that a merge cannot write. Raises InputDependentError for
    an update that cannot be merged.
    """
    w = weight.dense()
    found = {}
    for kind, dtype in DTYPES.items():
        copy = DenseWeight(w.to(dtype, copy=True))
        if bool(copy.matrix.isfinite().all()):
            found[kind] = fold(name, copy, update_of(record, name, copy).factors(copy))[1]
    storages = {kind: cls() for kind, cls in STORAGES.items() if kind != "dense"}
    for kind, storage in storages.items() if record.sites[name].kind == "linear" else ():
        quantized = storage.quantize(w)
        factors = update_of(record, name, quantized).factors(quantized)
        for rounding in ROUNDINGS if type(quantized).requantize is not Weight.requantize else ():
            merged = quantized.requantize(factors, rounding)
            found[f"{kind} {rounding}"] = measured(name, quantized, merged, factors)
    return {kind: found[kind] for kind in kinds() if kind in found}


def overall(sites: Sequence[Mapping[str, SiteMerge]]) -> dict[str, float]:
    """The share of ΔW that would survive over all sites that have one in a storage, by `kinds`."""
    found = {}
    for kind in kinds():
        here = [site[kind] for site in sites if kind in site]
        total = sum(site.change**2 for site in here)
        if here:
            found[kind] = sum(site.survival * site.change**2 for site in here) / total if total else 1.0
    return found
