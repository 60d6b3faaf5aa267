"""Decompose a saved adapter into rank-one components for each site, and choose which of them to keep.

    B A = Σ σ_i u_i v_iᵀ        σ_1 >= σ_2 >= ...        the first components of each site are kept

The ranks are chosen by a share of each site's Σ σ², by a share of Σ σ² over all sites, or by a limit on the bytes of
all tensors. In the last two cases the components of all sites compete by σ² per byte.

Shapes: O out_features, I in_features, R rank, K = min(O, R, I).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from reparam.adapter.updates import update_of
from reparam.combine.lowrank import numeric_rank, singular
from reparam.combine.operands import nothing
from reparam.core.base import Site, Update
from reparam.core.method import Method
from reparam.core.progress import tracked
from reparam.core.registry import METHODS
from reparam.errors import FormatError
from reparam.io.record import Record


class Part(NamedTuple):
    """The singular value decomposition of one site's low-rank change, in float64."""

    site: Site
    u: Tensor  # [O, K]
    values: Tensor  # [K], descending
    vh: Tensor  # [K, I]
    rank: int
    """The stored rank R."""
    cost: int
    """Bytes of one component in the stored tensors."""
    least: int
    """The lowest allowed rank: 0 if the site may leave the adapter or may have rank 0, else 1."""

    def lost(self, rank: int) -> float:
        """Frobenius norm of the change that is dropped if only the first `rank` components are kept."""
        return float(self.values[rank:].norm())

    @property
    def own(self) -> int:
        """The numerical rank of the change: the number of singular values above float32 rounding."""
        return numeric_rank(self.values)


@torch.no_grad()
def parts_of(record: Record, label: str) -> dict[str, Part]:
    """Decompose the low-rank change of every site, without gains.

    Raises FormatError, starting with `label`, if the method has no components or all changes are zero.
    """
    if not record.method.has_components:
        raise FormatError(
            f"{label}: {record.method.name} has no components that could be dropped one by one; "
            f"{', '.join(name for name, method in METHODS.items() if method.has_components)} have. "
            f"Convert the adapter to a LoRA with reparam compose --rank"
        )
    if reason := record.method.no_components_reason():
        raise FormatError(f"{label}: {reason}")
    parts = {
        name: _part(record, site, label) for name, site in tracked(record.sites.items(), "decomposing", unit="sites")
    }
    if not any(float(part.values.sum()) for part in parts.values()):
        raise FormatError(f"{label}: this adapter changes nothing, because B A is zero at every site")
    return parts


def held(record: Record) -> int:
    """Total size of an adapter's tensors in bytes."""
    return sum(tensor.nbytes for tensor in record.tensors.values())


def bare(method: Method, site: Site) -> tuple[Update, str]:
    """A new low-rank update of this site, without magnitudes, and the prefix of its tensors' names in files."""
    part = method.build(site, nothing(site), None).low_rank_part()
    assert part is not None, f"{method.name} has components, and its update has no low_rank_part"
    return part[0], f"{site.name}.{part[1]}"


def _part(record: Record, site: Site, label: str) -> Part:
    try:
        found = update_of(record, site.name, nothing(site), dtype=torch.float64).low_rank_part()
    except ValueError as error:
        raise FormatError(f"{label}: {error}") from error
    assert found is not None, f"{record.method.name} has components, and its update has no low_rank_part"
    update, start = found
    factors = update.factors(nothing(site))
    stored = len(factors.A)
    size = sum(record.tensors[f"{site.name}.{start}{key}"].nbytes for key in update.roles)
    cost = size // stored if stored else 0
    fixed = any(f"{site.name}.{key}" in record.tensors for key in ("bias", "magnitude"))
    least = 1 if fixed and record.method.drops_empty_sites else 0
    return Part(site, *singular(factors), stored, cost, least)


def by_energy(parts: Mapping[str, Part], energy: float) -> dict[str, int]:
    """The lowest rank of each site that keeps the share `energy`, in (0, 1], of its |B A|²."""
    found = {}
    for name, part in parts.items():
        kept = part.values.square().cumsum(0)
        enough = int((kept < energy * kept[-1]).sum()) + 1 if len(kept) else 0
        found[name] = max(part.least, min(enough, part.own))
    return found


def by_bytes(parts: Mapping[str, Part], most: int, now: int) -> dict[str, int]:
    """Ranks that fit all tensors into `most` bytes: the components with the highest σ² per byte.

    `now` is the current size in bytes. A larger limit keeps all components of a smaller one. Raises ValueError if
    `most` is too small for any component.
    """
    ranks = {name: part.least for name, part in parts.items()}
    used = now - sum(part.cost * (part.rank - ranks[name]) for name, part in parts.items())
    rest = ranked(parts)
    needed = used + (parts[rest[0]].cost if not any(ranks.values()) else 0)
    if needed > most:
        raise ValueError(f"compress: bytes={most}: this adapter needs at least {needed:,} bytes; it has {now:,} now")
    for name in rest:
        used += parts[name].cost
        if used > most:
            break
        ranks[name] += 1
    return ranks


def within(parts: Mapping[str, Part], energy: float) -> dict[str, int]:
    """Ranks that keep the share `energy` of |B A|² over all sites; components enter in the order of `by_bytes`."""
    ranks = {name: part.least for name, part in parts.items()}
    total = sum(float(part.values.square().sum()) for part in parts.values())
    lost = sum(part.lost(part.least) ** 2 for part in parts.values())
    for name in ranked(parts):
        part, at = parts[name], ranks[name]
        if lost <= (1 - energy) * total or at >= part.own:
            continue
        lost -= float(part.values[at]) ** 2
        ranks[name] += 1
    return ranks


def ranked(parts: Mapping[str, Part]) -> list[str]:
    """The site of each component above the lowest rank, ordered by σ² per byte, highest first."""
    found = []
    for name, part in parts.items():
        squares = part.values.square().tolist() + [0.0] * (part.rank - len(part.values))
        found += [(-square / part.cost, name) for square in squares[part.least :]]
    return [name for _, name in sorted(found, key=lambda item: item[0])]
