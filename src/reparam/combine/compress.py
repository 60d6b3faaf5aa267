"""Fewer components for a finished adapter, without its data: the nearest change of lower rank, site by site.

A site's change is a sum of components, B A = Σ σ_i u_i v_iᵀ, of which the largest stay: no other change of that rank is
nearer in the Frobenius norm (Eckart-Young). What is left out is known before anything is written:

    error² = |B A - kept|² = Σ of the σ_i² that are dropped

What stays is told by a share of |B A|² that each site keeps (`energy`), a highest rank (`rank`), or the size of the
tensors (`bytes`), for which the components of all sites compete by σ² a byte. A site of rank 0 leaves a LoRA.

The result has the method of the original. LoRA: B = U √Σ / s and A = √Σ Vᵀ, with the scale s that the new rank has.
AdaLoRA: P = U, Λ = Σ / s and Q = Vᵀ, so that P and Q are orthogonal again. DoRA: the magnitudes m stay, the direction
W + B A loses components, and W' = m (W + kept) / |W + kept| follows; the error is that of B A and not that of W'. A
site whose rank stays is copied, bit for bit.

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
from reparam.io import files
from reparam.io.record import Record


@dataclasses.dataclass(frozen=True)
class SiteCompression:
    """What became of one site."""

    name: str
    before: int
    """Rank of the original."""
    rank: int
    change: float
    """Frobenius norm of B A, the scale in it."""
    lost: float
    """Frobenius norm of what was dropped from it."""
    saved: int
    """Bytes of tensors that the site needs no more."""

    @property
    def error(self) -> float:
        """|lost| / |B A|; 0 where there is no change."""
        return self.lost / self.change if self.change else 0.0


@dataclasses.dataclass(frozen=True)
class Compression:
    """A smaller adapter, and what that cost."""

    record: Record
    sites: tuple[SiteCompression, ...]
    before: int
    """Bytes of the original's tensors."""

    @property
    def bytes(self) -> int:
        """Bytes of the tensors that are left."""
        return held(self.record)

    @property
    def error(self) -> float:
        """|lost| / |change| over all sites."""
        total = sum(site.change**2 for site in self.sites)
        return (sum(site.lost**2 for site in self.sites) / total) ** 0.5 if total else 0.0

    def __repr__(self) -> str:
        sizes = f"{size(self.before)} -> {size(self.bytes)}"
        return f"Compression({len(self.record.sites)} sites, {sizes}, error {self.error:.4g})"

    def save(self, folder: str | Path, *, format: str = "reparam") -> None:
        """Write it as an ordinary adapter. Raises ValueError as `Adapter.save` does."""
        files.write(folder, self.record, format=format)

    def put(self, model: nn.Module, *, name: str = "default", activate: bool = True) -> Adapter:
        """Put it on `model`, frozen. Raises FormatError as `load` does."""
        return place(model, self.record, Path(f"compression {name!r}"), name=name, activate=activate)


@torch.no_grad()
def compress(
    adapter: str | Path | Record,
    *,
    energy: float | None = None,
    rank: int | None = None,
    bytes: int | None = None,
) -> Compression:
    """The nearest adapter with fewer components.

    Args:
        adapter: a folder, ours or PEFT's, or what `io.files.read` makes of it: LoRA, DoRA or AdaLoRA.
        energy: the share of |B A|², in (0, 1], that each site keeps with as few components as do; 1 drops rounding.
        rank: the most components that a site may have.
        bytes: the most that all tensors together may take, magnitudes and biases included.

    Raises ValueError unless exactly one of the three is given and can be, and FormatError (a ValueError) for another
    method, and for an adapter that changes nothing.

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
    record = adapter if isinstance(adapter, Record) else files.read(adapter)
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
    """The adapter with these ranks, as far as its sites have them."""
    ranks = {
        name: part.rank if ranks[name] >= part.rank else min(ranks[name], len(part.values))
        for name, part in parts.items()
    }
    if not any(ranks.values()):
        raise ValueError("compress: nothing would be left of the adapter; allow more")
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
    small = dataclasses.replace(record, method=method, sites=stays, tensors=order, claims=None)
    return Compression(small, tuple(found), held(record))


def _tensors(record: Record, method: Method, part: Part, rank: int) -> dict[str, Tensor]:
    """The factors of one site by their names in files, in the dtype that they had."""
    update, start = bare(method, part.site)
    u, s, vh = part.u[:, :rank], part.values[:rank], part.vh[:rank]
    found = update.from_svd(u, s, vh)
    return {start + key: t.to(record.tensors[start + key].dtype).contiguous() for key, t in found.items()}


def _check_settings(energy: float | None, rank: int | None, bytes: int | None) -> None:
    given: Sequence[str] = [
        key for key, value in (("energy", energy), ("rank", rank), ("bytes", bytes)) if value is not None
    ]
    problems = [] if len(given) == 1 else [f"give one of energy, rank and bytes, not {len(given)} of them"]
    if energy is not None and not (finite(energy) and 0 < energy <= 1):
        problems.append(f"energy={energy!r}: expected a share above 0 and up to 1")
    problems += [
        f"{key}={value!r}: expected a whole number of at least 1"
        for key, value in (("rank", rank), ("bytes", bytes))
        if value is not None and not whole(value, 1)
    ]
    if problems:
        raise ValueError(f"compress: {listed(problems)}")
