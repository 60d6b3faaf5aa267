"""Compress a saved adapter to lower ranks, without training data, by a truncated SVD of each site's change.

The change of a site is a sum of components, B A = Σ σ_i u_i v_iᵀ. Keeping the components with the largest σ_i gives the
best approximation of that rank in the Frobenius norm (Eckart-Young). The error is known in advance:

    error² = |B A - kept|² = Σ of the σ_i² that are dropped

The caller gives the share of |B A|² that each site keeps (`energy`), a highest rank (`rank`), or the size of all
tensors (`bytes`). For `bytes` the components of all sites compete by σ² per byte. A LoRA drops sites of rank 0.

The result has the same method as the original. LoRA: B = U √Σ / s and A = √Σ Vᵀ, with the scale s of the new rank.
AdaLoRA: P = U, Λ = Σ / s and Q = Vᵀ, so P and Q are orthogonal. DoRA: the magnitudes m stay and the direction W + B A
loses components, so W' = m (W + kept) / |W + kept|; the reported error is that of B A, not that of W'. A site whose
rank does not change is copied bit for bit.

Shapes: O out_features, I in_features, R rank, K = min(O, R, I).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from reparam.adapter.adapter import Adapter
from reparam.adapter.load import place
from reparam.adapter.quantize import size
from reparam.combine.components import Part, bare, by_bytes, by_energy, held, parts_of
from reparam.core.checks import finite, listed, whole
from reparam.core.method import Method
from reparam.core.text import counted
from reparam.io import files
from reparam.io.record import Record


@dataclasses.dataclass(frozen=True)
class SiteCompression:
    """Ranks and approximation error of one compressed site."""

    name: str
    before: int
    """Rank of the original."""
    rank: int
    """Rank of the result."""
    change: float
    """Frobenius norm of B A, including the scale."""
    lost: float
    """Frobenius norm of the dropped components."""
    saved: int
    """Bytes by which the site's tensors became smaller."""

    @property
    def error(self) -> float:
        """Relative error |lost| / |B A|; 0 if B A is zero."""
        return self.lost / self.change if self.change else 0.0


@dataclasses.dataclass(frozen=True)
class Compression:
    """A compressed adapter, and its approximation error for each site."""

    record: Record
    sites: tuple[SiteCompression, ...]
    before: int
    """Total size of the original's tensors in bytes."""

    @property
    def bytes(self) -> int:
        """Total size of the compressed tensors in bytes."""
        return held(self.record)

    @property
    def error(self) -> float:
        """Relative error |lost| / |B A| over all sites."""
        total = sum(site.change**2 for site in self.sites)
        return (sum(site.lost**2 for site in self.sites) / total) ** 0.5 if total else 0.0

    def __repr__(self) -> str:
        sizes = f"{size(self.before)} -> {size(self.bytes)}"
        return f"Compression({counted(len(self.record.sites), 'site')}, {sizes}, error {self.error:.4g})"

    def save(self, folder: str | Path, *, format: str = "reparam") -> None:
        """Write the result as an adapter; `format` is "reparam" or "peft". Raises the errors of `Adapter.save`."""
        files.write(folder, self.record, format=format)

    def put(self, model: nn.Module, *, name: str = "default", activate: bool = True) -> Adapter:
        """Put the result on `model` as a frozen adapter. Raises FormatError as `load` does."""
        return place(model, self.record, Path(f"compression {name!r}"), name=name, activate=activate)


@torch.no_grad()
def compress(
    adapter: str | Path | Record,
    *,
    energy: float | None = None,
    rank: int | None = None,
    bytes: int | None = None,
) -> Compression:
    """Compress a saved LoRA, DoRA or AdaLoRA to its best approximation with fewer components.

    Args:
        adapter: a folder in reparam's or PEFT's format, or a record that `io.files.read` returned.
        energy: the share of |B A|², in (0, 1], that each site keeps; 1 drops only components that are rounding noise.
        rank: the highest rank of a site, at least 1.
        bytes: the largest total size of all tensors in bytes, including magnitudes and biases.

    Raises ValueError unless exactly one of `energy`, `rank` and `bytes` is given and in range, and FormatError (a
    ValueError) if the method has no components or the adapter changes nothing.

    >>> import tempfile, torch, reparam
    >>> net = torch.nn.ModuleDict({"up": torch.nn.Linear(6, 8), "down": torch.nn.Linear(8, 6)})
    >>> adapter = reparam.attach(net, reparam.LoRA(r=4))
    >>> with torch.no_grad():
    ...     for update in adapter.updates.values():
    ...         _ = update.B[:, :2].normal_()
    >>> folder = tempfile.mkdtemp()
    >>> adapter.save(folder + "/a")
    >>> found = compress(folder + "/a", energy=1.0)
    >>> [(site.before, site.rank, round(site.error, 6)) for site in found.sites], found.before, found.bytes
    ([(4, 2, 0.0), (4, 2, 0.0)], 448, 224)
    """
    _check_settings(energy, rank, bytes)
    record = adapter if isinstance(adapter, Record) else files.read(adapter).without_beside(adapter)
    parts = parts_of(record, "the adapter" if isinstance(adapter, Record) else str(adapter))
    if energy is not None:
        ranks = by_energy(parts, energy)
    elif rank is not None:
        ranks = dict.fromkeys(parts, rank)
    else:
        assert bytes is not None
        ranks = by_bytes(parts, bytes, held(record))
    return cut(record, parts, ranks)


@torch.no_grad()
def cut(record: Record, parts: Mapping[str, Part], ranks: Mapping[str, int]) -> Compression:
    """Truncate each site to its rank in `ranks`; a site with a lower rank keeps its own."""
    ranks = {
        name: part.rank if ranks[name] >= part.rank else min(ranks[name], len(part.values))
        for name, part in parts.items()
    }
    if not any(ranks.values()):
        raise ValueError("compress: all components would be dropped; allow a higher rank, energy or size")
    method = record.method.with_ranks(ranks)
    stays = {name: site for name, site in record.sites.items() if ranks[name] or not method.drops_empty_sites}
    gone = tuple(f"{name}." for name in record.sites if name not in stays)
    tensors = {key: tensor for key, tensor in record.tensors.items() if not key.startswith(gone)}
    found = []
    for name, part in parts.items():
        rank = ranks[name]
        if name in stays and rank != part.rank:
            tensors |= _tensors(record, method, part, rank)
        change, lost = float(part.values.norm()), part.lost(rank) if rank != part.rank else 0.0
        found.append(SiteCompression(name, part.rank, rank, change, lost, part.cost * (part.rank - rank)))
    order = {key: tensors[key] for key in record.tensors if key in tensors}
    tied = {path: tie for path, tie in record.tied.items() if tie.to in stays}
    small = dataclasses.replace(record, method=method, sites=stays, tensors=order, tied=tied, claims=None)
    return Compression(small, tuple(found), held(record))


def _tensors(record: Record, method: Method, part: Part, rank: int) -> dict[str, Tensor]:
    """The truncated factors of one site by their names in files, in their original dtypes."""
    update, start = bare(method, part.site)
    u, s, vh = part.u[:, :rank], part.values[:rank], part.vh[:rank]
    found = update.from_svd(u, s, vh)
    return {start + key: t.to(record.tensors[start + key].dtype).contiguous() for key, t in found.items()}


def _check_settings(energy: float | None, rank: int | None, bytes: int | None) -> None:
    given: Sequence[str] = [
        key for key, value in (("energy", energy), ("rank", rank), ("bytes", bytes)) if value is not None
    ]
    problems = [] if len(given) == 1 else [f"expected exactly one of energy, rank and bytes, found {len(given)}"]
    if energy is not None and not (finite(energy) and 0 < energy <= 1):
        problems.append(f"energy={energy!r}: expected a number above 0 and up to 1")
    problems += [
        f"{key}={value!r}: expected a whole number of at least 1"
        for key, value in (("rank", rank), ("bytes", bytes))
        if value is not None and not whole(value, 1)
    ]
    if problems:
        raise ValueError(f"compress: {listed(problems)}")
