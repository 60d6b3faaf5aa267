"""Suggest which sites of an adapter to drop or to reduce in rank, and predict the loss.

Singular components of all sites are kept in the order of σ² per byte (`components.py`), until the requested share of
Σ |ΔW|² is kept. The loss is predicted as a share of energy (squared Frobenius norm). The same energy has different
effects on the outputs at different sites, so check the suggestion by its score on held-out rows.
"""

from __future__ import annotations

import dataclasses

from reparam.combine.components import parts_of, within
from reparam.combine.compress import Compression, cut
from reparam.io.record import Record


@dataclasses.dataclass(frozen=True)
class SiteSuggestion:
    """Suggested rank of one site."""

    name: str
    before: int
    """Rank now."""
    rank: int
    """Suggested rank; 0 drops the site."""
    saved: int
    """Bytes of tensors that are saved."""
    lost: float
    """Share of the site's |ΔW|² that is lost, from 0 to 1."""
    of_all: float
    """Share of Σ |ΔW|² over all sites that this site loses, from 0 to 1."""


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A smaller version of an adapter, and what it saves and loses."""

    sites: tuple[SiteSuggestion, ...]
    """Sites whose rank changes, in descending order of bytes saved."""
    before: int
    """Bytes of all tensors now."""
    bytes: int
    """Bytes of all tensors as suggested; `compress(adapter, bytes=...)` with this number makes the same adapter."""
    kept: float
    """Share of Σ |ΔW|² that is kept, from 0 to 1."""
    compression: Compression
    """The suggested adapter."""


def suggest(record: Record, energy: float = 0.99, *, label: str = "the adapter") -> Suggestion:
    """Suggest the smallest adapter, by σ² per byte, that keeps the share `energy` of Σ |ΔW|² over all sites.

    `label` names the adapter in messages. Raises ValueError unless 0 < energy < 1, and FormatError for adapters that
    `compress` rejects.
    """
    if not 0 < energy < 1:
        raise ValueError(f"suggest: energy={energy!r}: expected a share between 0 and 1, such as 0.99")
    parts = parts_of(record, label)
    found = cut(record, parts, within(parts, energy))
    total = sum(site.change**2 for site in found.sites)
    sites = [
        SiteSuggestion(site.name, site.before, site.rank, site.saved, site.error**2, site.lost**2 / total)
        for site in found.sites
        if site.rank != site.before
    ]
    sites.sort(key=lambda site: (-site.saved, site.of_all))
    return Suggestion(tuple(sites), found.before, found.bytes, 1 - found.error**2, found)
