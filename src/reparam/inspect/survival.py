"""Predict the share of ΔW that a merge would keep, for each dtype and storage of the merged weights.

    survival = ⟨merged - W, ΔW⟩ / ⟨ΔW, ΔW⟩        as `merge` reports it; 1 means that all of ΔW is kept

For each site and storage, W is first converted to that storage, as when a base is loaded in it, and ΔW is then merged.
Merging into bfloat16 and float16 rounds once. Merging into quantized storages chooses codes by the rounding `nearest`
or `aware` (`weights/rounding.py`). Sites are handled one at a time, and the merged weights are discarded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from reparam.adapter.fold import SiteMerge, fold, measured
from reparam.adapter.updates import update_of
from reparam.core.base import Weight
from reparam.core.registry import STORAGES
from reparam.io.record import Record
from reparam.weights.dense import DenseWeight
from reparam.weights.quantized import ROUNDINGS

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def kinds() -> list[str]:
    """The keys of `survivals`: bfloat16, float16, and each quantized storage with each rounding: "int8 nearest"."""
    quantized = [name for name in STORAGES if name != "dense"]
    return [*DTYPES, *(f"{name} {rounding}" for name in quantized for rounding in reversed(ROUNDINGS))]


@torch.no_grad()
def survivals(record: Record, name: str, weight: Weight) -> dict[str, SiteMerge]:
    """Merge one site of a saved adapter into copies of `weight`, its frozen matrix; return the results by `kinds`.

    Left out are: float16 if an entry is too large for it; quantized storages for embeddings and vectors, which are not
    quantized; and quantized storages that a merge cannot write. Raises InputDependentError for an update that cannot
    be merged.
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
    """Survival over all sites together, by `kinds`: the mean over sites, weighted by |ΔW|²."""
    found = {}
    for kind in kinds():
        here = [site[kind] for site in sites if kind in site]
        total = sum(site.change**2 for site in here)
        if here:
            found[kind] = sum(site.survival * site.change**2 for site in here) / total if total else 1.0
    return found
