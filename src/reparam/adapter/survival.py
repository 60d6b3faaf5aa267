"""How much of an update survives a merge: the result for one site, and for all sites together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from reparam.core.base import Factors, Weight


@dataclasses.dataclass(frozen=True)
class SiteMerge:
    """The result of merging one site."""

    name: str
    dtype: torch.dtype
    change: float
    """Frobenius norm of ΔW."""
    survival: float
    """Share of ΔW that the written weight contains, 1 for all of it; 1 if ΔW is zero."""
    storage: str = "dense"
    """Name of the storage of the written weight."""
    noise: float | None = None
    """|written − W − ΔW| / |ΔW|, the relative error of a quantized weight; None for a dense one."""


def measured(name: str, weight: Weight, merged: Weight, factors: Factors) -> SiteMerge:
    """Measure the survival and the noise of an update in a weight that was quantized again."""
    size = max(1, (1 << 20) // weight.in_features)  # rows per block: at most 2**20 entries are dequantized at once
    sums = torch.zeros(3, dtype=torch.float64, device=weight.device)
    for start in range(0, weight.out_features, size):
        rows = slice(start, start + size)
        old = weight.dense(rows)
        delta, written = factors.change(old, rows), merged.dense(rows) - old
        sums += torch.stack([(delta * written).sum(), delta.square().sum(), (written - delta).square().sum()])
    kept, change, noise = sums.tolist()
    if not change:
        return SiteMerge(name, weight.dtype, 0.0, 1.0, merged.storage.name, 0.0)
    return SiteMerge(name, weight.dtype, change**0.5, kept / change, merged.storage.name, (noise / change) ** 0.5)


def survival(sites: Sequence[SiteMerge]) -> dict[torch.dtype | str, float]:
    """Share of ΔW that survived over these sites: dense ones by dtype, quantized ones by storage name."""
    groups: dict[torch.dtype | str, list[SiteMerge]] = {}
    for site in sites:
        groups.setdefault(site.dtype if site.storage == "dense" else site.storage, []).append(site)
    found = {}
    for kind, members in groups.items():
        total = sum(site.change**2 for site in members)
        found[kind] = sum(site.survival * site.change**2 for site in members) / total if total else 1.0
    return found


def short(dtype: torch.dtype | str) -> str:
    """The name of a dtype without its module, or of a storage."""
    return str(dtype).removeprefix("torch.")
