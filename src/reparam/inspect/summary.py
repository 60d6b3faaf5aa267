"""What an adapter folder holds: method, sites, ranks, the size of the change, bytes. Needs no base model.

With the base, the change is also compared with the weights it changes: |ΔW| / |W|, Frobenius norms.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from reparam.base import InputDependentError, Update, Weight
from reparam.fingerprint import base_tensors
from reparam.io import files
from reparam.io.record import Record
from reparam.weights.dense import DenseWeight


@dataclasses.dataclass(frozen=True)
class SiteSummary:
    """One site of an adapter."""

    name: str
    shape: tuple[int, int]
    """O and I."""
    rank: int | None
    change: float | None
    """Frobenius norm of B·A; None where the update has no factors without its input or its base."""
    weight: float | None
    """Frobenius norm of W; None without the base."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """One adapter."""

    folder: str
    format: str
    method: str
    settings: dict[str, object]
    base: str
    parameters: int
    bytes: int
    """Size of the folder's files."""
    sites: tuple[SiteSummary, ...]
    replaced: tuple[str, ...]
    """Modules that the adapter replaces whole."""

    @property
    def idle(self) -> bool:
        """Whether no site changes anything: the adapter does nothing."""
        return not self.replaced and all(site.change == 0 for site in self.sites)


def summarise(folder: str | Path, model: nn.Module | None = None) -> Summary:
    """Read an adapter, this project's or PEFT's, and describe it. `model` is its base, plain, or None.

    Raises FormatError for a folder that holds no whole adapter.
    """
    folder = Path(folder)
    record = files.read(folder)
    own = dict(base_tensors(model)) if model is not None else {}
    sites = []
    for name, site in record.sites.items():
        update = stand_alone(record, name)
        rank, change = _size(update, DenseWeight(torch.zeros(1, 1).expand(site.out_features, site.in_features)))
        matrix = own.get(f"{name}.weight")
        norm = None if matrix is None else float(matrix.detach().float().norm())
        sites.append(SiteSummary(name, (site.out_features, site.in_features), rank, change, norm))
    return Summary(
        folder=str(folder),
        format=files.format_of(folder),
        method=record.method.name,
        settings=record.method.settings(),
        base=_base(record),
        parameters=sum(tensor.numel() for tensor in record.tensors.values()),
        bytes=sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
        sites=tuple(sites),
        replaced=record.replaced,
    )


def _base(record: Record) -> str:
    if record.base is None:
        return "not stated"
    packing = ", ".join(f"{len(p.modules)} matrices in {p.storage}" for p in record.base.packing)
    return (record.base.source or record.base.architecture) + (f", trained with {packing}" if packing else "")


def stand_alone(record: Record, name: str) -> Update:
    """The update of one site with its saved values, without a model: the frozen matrix it sees is zero."""
    site = record.sites[name]
    update = record.method.build(site, DenseWeight(torch.zeros(1, 1).expand(site.out_features, site.in_features)), None)
    with torch.no_grad():
        for key, parameter in update.named_parameters():
            parameter.copy_(record.tensors[f"{name}.{key}"])
    return update


@torch.no_grad()
def _size(update: Update, weight: Weight) -> tuple[int | None, float | None]:
    try:
        factors = update.factors(weight)
    except InputDependentError:
        return None, None
    return len(factors.A), (factors.low_rank_norm() if factors.gain is None else None)
