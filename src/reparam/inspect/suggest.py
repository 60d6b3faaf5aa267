"""Which sites of an adapter could be dropped or shrunk, and what that would lose.

The components of all sites compete by σ² a byte (`components.py`) until the share of Σ |ΔW|² that is asked for is kept.
The loss is predicted in energy, Frobenius norms squared: sites differ in what a unit of it does to the outputs, so that
a score on held-out rows has the last word.
"""

from __future__ import annotations

import dataclasses

from reparam.combine.components import parts_of, within
from reparam.combine.compress import Compression, cut
from reparam.io.record import Record


@dataclasses.dataclass(frozen=True)
class SiteSuggestion:
    """What could be done to one site."""

    name: str
    before: int
    rank: int
    """0 drops the site."""
    saved: int
    """Bytes of tensors that the site would no longer need."""
    lost: float
    """Share of the site's own |ΔW|² that goes."""
    of_all: float
    """The same as a share of all sites' Σ |ΔW|²."""


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """What could be done to an adapter."""

    sites: tuple[SiteSuggestion, ...]
    """Those that change, by what they save."""
    before: int
    """Bytes of the tensors now."""
    bytes: int
    """Bytes then; `compress(adapter, bytes=...)` with this number gives it."""
    kept: float
    """Share of Σ |ΔW|² that stays."""
    compression: Compression
    """The adapter as suggested."""


def suggest(record: Record, energy: float = 0.99, *, label: str = "the adapter") -> Suggestion:
    """The smallest adapter, by this rule, that keeps a share of Σ |ΔW|² over all sites. `label` is for messages.

    Raises ValueError for a share that is none, and FormatError as `compress` does.
    """
    if not 0 < energy < 1:
        raise ValueError(f"suggest: energy={energy!r}: expected a share between 0 and 1")
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
