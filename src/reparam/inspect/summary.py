"""Summarize an adapter's folder: method, sites, ranks, size of the change, and bytes. The base model is optional.

With the base, the change is also compared with the frozen weights: |ΔW| / |W|, in Frobenius norms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from reparam.adapter.updates import update_of
from reparam.core.base import Site, Weight
from reparam.core.progress import tracked
from reparam.core.text import counted
from reparam.errors import InputDependentError
from reparam.inspect.geometry import Axis, Directions, correlation, of_update
from reparam.io import files
from reparam.io.record import Record
from reparam.sites.fingerprint import base_tensors
from reparam.sites.module import is_quantized
from reparam.sites.wrapped import at
from reparam.weights.dense import DenseWeight, zero_weight


@dataclasses.dataclass(frozen=True)
class SiteSummary:
    """One site of an adapter."""

    name: str
    shape: tuple[int, int]
    """(out_features, in_features)."""
    rank: int | None
    """None if the update depends on its input."""
    change: float | None
    """Frobenius norm of ΔW; None if the update depends on its input, or depends on W and the base is not given."""
    weight: float | None
    """Frobenius norm of W; None without the base."""
    moved: Directions | None = None
    """ΔM and ΔD of the rows, or of the columns for a method with magnitudes by column; None without the base, for a
    vector, or if the update depends on its input."""
    offset: float = 0.0
    """Norm of the change of the bias."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """An adapter's method, settings, base, size and sites."""

    folder: str
    format: str
    method: str
    settings: dict[str, object]
    base: str
    parameters: int
    bytes: int
    """Total size of the files in the folder."""
    sites: tuple[SiteSummary, ...]
    replaced: tuple[str, ...]
    """Modules of which the adapter stores a full trained copy."""
    task: str = "causal"
    """What the model is for."""
    labels: tuple[str, ...] = ()
    """The classes of a classifier, in the order of its logits."""

    @property
    def correlation(self) -> float | None:
        """Pearson correlation of ΔM and ΔD over the sites, from -1 to 1; None for fewer than two sites with both."""
        found = [site.moved for site in self.sites if site.moved is not None]
        return correlation(found) if len(found) > 1 else None

    @property
    def idle(self) -> bool:
        """Whether the adapter does nothing: it changes no weight and no bias, and replaces no module."""
        return not self.replaced and all(site.change == site.offset == 0 for site in self.sites)


def summarize(folder: str | Path, model: nn.Module | None = None) -> Summary:
    """Read an adapter in reparam's or PEFT's format and summarize it. `model` is its base without adapters, or None.

    Raises FormatError for a folder without a complete adapter.
    """
    folder = Path(folder)
    record = files.read(folder)
    record.method.check(list(record.sites.values()))
    own = dict(base_tensors(model)) if model is not None else {}
    sites = []
    for name, site in tracked(record.sites.items(), "measuring", unit="sites"):
        sites.append(_summarize_site(record, name, site, frozen_weight(model, own, site)))
    return Summary(
        folder=str(folder),
        format=files.format_of(folder),
        method=record.method.name,
        settings=record.method.settings(),
        base=_base(record),
        parameters=sum(tensor.numel() for tensor in [*record.tensors.values(), *record.beside.values()]),
        bytes=sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
        sites=tuple(sites),
        replaced=record.replaced,
        task=record.head.task if record.head is not None else "causal",
        labels=record.head.labels if record.head is not None else (),
    )


@torch.no_grad()
def _summarize_site(record: Record, name: str, site: Site, weight: Weight | None) -> SiteSummary:
    shape = site.out_features, site.in_features
    known = weight if weight is not None else zero_weight(*shape)
    norm = None if weight is None else float(weight.squared_norms(1).sum().sqrt())
    update = update_of(record, name, known)
    offset = 0.0 if (moved := update.bias_delta()) is None else float(moved.norm())
    try:
        factors = update.factors(known)
    except InputDependentError:
        return SiteSummary(name, shape, None, None, norm)
    if factors.gain is None:
        change = factors.low_rank_norm()
    elif weight is None:
        return SiteSummary(name, shape, len(factors.A), None, None, offset=offset)
    else:
        squares = [factors.change(block.float(), rows).double().square().sum() for rows, block in weight.blocks()]
        change = float(torch.stack(squares).sum().sqrt())
    axis: Axis = record.method.magnitude_axis or "output"
    directions = None if weight is None or site.kind == "vector" else of_update(weight, factors, axis=axis)
    return SiteSummary(name, shape, len(factors.A), change, norm, directions, offset)


def frozen_weight(model: nn.Module | None, own: Mapping[str, Tensor], site: Site) -> Weight | None:
    """Return the frozen matrix of a site, or None without a base or if it has no such tensor.

    `own` are the base's tensors by name.
    """
    if model is None:
        return None
    if site.kind == "expert":
        return _expert_weight(model, own, site)
    if f"{site.name}.weight" not in own:
        return None
    module = at(model, site.name)
    if is_quantized(module):
        return module.frozen
    matrix = own[f"{site.name}.weight"].detach()
    return DenseWeight(matrix.t() if site.transposed else matrix[:, None] if site.kind == "vector" else matrix)


def _expert_weight(model: nn.Module, own: Mapping[str, Tensor], site: Site) -> Weight | None:
    """The matrix of one expert, which is quantized, or a part of a stack."""
    holder, number, name = site.name.rsplit(".", 2)
    if (stack := own.get(f"{holder}.{name}")) is None:
        module = dict(model.named_modules()).get(site.name)
        return module.frozen if module is not None and is_quantized(module) else None
    matrix = stack.detach()[int(number)]
    return DenseWeight(
        matrix.t() if matrix.shape != (site.out_features, site.in_features) or site.transposed else matrix
    )


def _base(record: Record) -> str:
    if record.base is None:
        return "not stated"
    quantizing = ", ".join(
        f"{counted(len(p.modules), 'matrix', 'matrices')} in {p.storage}" for p in record.base.packing
    )
    return (record.base.source or record.base.architecture) + (f", trained with {quantizing}" if quantizing else "")
