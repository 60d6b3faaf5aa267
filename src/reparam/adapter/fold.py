"""Fold an update into the weight of one site, and measure how much of it the written weight contains."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from reparam.core.base import Factors, Weight
from reparam.weights.dense import DenseWeight

BLOCK = 1 << 16  # elements of W per block on a CPU: 256 KiB in float32, so the buffers stay in a core's cache


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


def fold(name: str, weight: Weight, factors: Factors) -> tuple[Weight, SiteMerge]:
    """Merge one site: return the dense merged weight and its report. A dense `weight` is overwritten in place."""
    plain = weight.dense_or_none
    shape = weight.out_features, weight.in_features
    out = torch.empty(shape, dtype=weight.dtype, device=weight.device) if plain is None else plain.detach()
    dtype = torch.promote_types(out.dtype, torch.float32)
    A, B = factors.A.to(dtype), factors.B.to(dtype)
    gain = None if factors.gain is None else factors.gain.to(dtype)
    size = max(1, BLOCK // out.shape[1]) if out.device.type == "cpu" else len(out)
    buffers = A.new_empty(2, size, out.shape[1])
    kept, whole = [], []
    for start in range(0, len(out), size):
        rows = slice(start, start + size)
        # `dense` returns float32, which would round a float64 base.
        old = out[rows] if plain is not None and dtype != torch.float32 else weight.dense(rows).to(dtype)
        delta, new = buffers[:, : len(old)]
        torch.mm(B[rows], A, out=delta)
        if gain is not None:
            delta += (gain[rows, None] - 1) * old  # compute ΔW directly: W' − W would lose digits
        torch.add(old, delta, out=new)
        if out.dtype != dtype:
            new.copy_(new.to(out.dtype))  # the values that will be stored, so that the report measures the rounding
        written, flat = new - old, delta.view(-1)  # before the write: old may be a view of out
        kept.append(torch.dot(written.reshape(-1), flat))
        whole.append(torch.dot(flat, flat))
        out[rows] = new
    change = float(torch.stack(whole).double().sum())  # one synchronization for all blocks
    share = float(torch.stack(kept).double().sum()) / change if change else 1.0
    merged = DenseWeight(out) if plain is None else weight
    return merged, SiteMerge(name, out.dtype, change**0.5, share)


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


def check_finite(name: str, weight: Weight, factors: Factors) -> None:
    """Raise ValueError unless a bound proves every entry of W' finite: |W'| <= gain |W| + |B| |A|."""
    bound = factors.A.double().norm() * factors.B.double().norm()
    if weight.dtype == torch.float16 or factors.gain is not None:  # weights never come near the range of wider dtypes
        gain = 1.0 if factors.gain is None else factors.gain.double().abs().max()
        bound = bound + gain * weight.dense().abs().max()
    if not bound < torch.finfo(weight.dtype).max / 2:  # half: a margin for rounding; `not <` also refuses NaN
        raise ValueError(
            f"{name}: the merged weight may overflow {short(weight.dtype)} (bound on its entries: "
            f"{float(bound):.3g}), so nothing was merged; check the adapter for NaN, or merge in float32"
        )


def short(dtype: torch.dtype | str) -> str:
    """The name of a dtype without the prefix "torch."; other names stay as they are."""
    return str(dtype).removeprefix("torch.")
