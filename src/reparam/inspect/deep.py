"""Analyze the change ΔW of each site: its spectrum, its amplification, and how much of it a merge would keep."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from reparam.adapter.fold import SiteMerge
from reparam.core.checks import listed
from reparam.core.progress import tracked
from reparam.errors import FormatError, InputDependentError
from reparam.inspect.amplification import Amplification, amplification
from reparam.inspect.similarity import Similarity, similarity
from reparam.inspect.spectrum import Spectrum, spectra, spectrum, weights
from reparam.inspect.survival import survivals
from reparam.io import files
from reparam.io.record import Record

SHARES = (0.9, 0.99)


@dataclasses.dataclass(frozen=True)
class SiteView:
    """Analysis of one site of an adapter."""

    name: str
    spectrum: Spectrum | None
    """None if ΔW is not a single matrix, because it depends on the input, or if it is not known without the base."""
    amplification: Amplification | None
    """None without the base, without a spectrum, or if ΔW is zero."""
    survival: dict[str, SiteMerge] | None
    """Result of a merge by dtype or storage; None if it was not requested."""

    def told(self) -> dict[str, Any]:
        """Return the analysis as plain values for JSON."""
        found: dict[str, Any] = {"name": self.name, "spectrum": None, "amplification": None}
        if (seen := self.spectrum) is not None:
            found["spectrum"] = {
                "of": {"all": "ΔW", "leading": "ΔW, leading values", "low-rank part": "s B A"}[seen.kind],
                "values": seen.values.tolist(),
                "held": seen.held,
                "rank": seen.rank,
                "effective rank": seen.effective,
                "stable rank": seen.stable,
                "needed": {f"{share:.0%}": seen.needed(share) for share in SHARES},
            }
        if (against := self.amplification) is not None:
            found["amplification"] = against._asdict() | {"factor": against.factor}
        if self.survival is not None:
            found["survival"] = {
                kind: {"survival": merged.survival, "noise": merged.noise} for kind, merged in self.survival.items()
            }
        return found


def view(folder: str | Path, model: nn.Module | None = None, *, survival: bool = False) -> tuple[SiteView, ...]:
    """Analyze all sites of an adapter in reparam's or PEFT's format. `model` is its base without adapters, or None.

    With `survival`, also merge each site into every dtype and storage and measure how much of ΔW is kept. Raises
    FormatError for a folder without a complete adapter, and ValueError for `survival` without a base.
    """
    if survival and model is None:
        raise ValueError("survival of a merge depends on the base weights; give the base (--base)")
    record = files.read(folder)
    found = []
    for name, weight in tracked(weights(record, model).items(), "measuring", unit="sites"):
        seen = spectrum(record, name, weight)
        against = amplification(seen, weight) if seen is not None and weight is not None else None
        kept = None
        if survival and weight is not None:
            try:
                kept = survivals(record, name, weight)
            except InputDependentError:
                kept = {}
        found.append(SiteView(name, seen, against, kept))
    return tuple(found)


def compared(folder: str | Path, other: str | Path, model: nn.Module | None = None) -> dict[str, Similarity]:
    """Compare the directions of two adapters of the same base at each site that both change.

    `model` is the base without adapters, or None. Sites at which one of the adapters has no spectrum or a zero ΔW are
    left out. Raises FormatError if the adapters have no site in common, or if a site's matrices differ in size.
    """
    one, its = files.read(folder), files.read(other)
    shared = [name for name in one.sites if name in its.sites]
    if not shared:
        raise FormatError(
            f"{folder} and {other} have no site in common: the first changes {listed(list(one.sites), shown=2)}, "
            f"the second {listed(list(its.sites), shown=2)}"
        )
    here, there = (spectra(_only(record, shared), model) for record in (one, its))
    found = {}
    for name in tracked(shared, "comparing", unit="sites"):
        if name in here and name in there:
            try:
                alike = similarity(here[name], there[name])
            except ValueError as error:
                raise FormatError(f"{name}: {error}; the adapters must have the same base") from None
            if alike is not None:
                found[name] = alike
    return found


def _only(record: Record, names: list[str]) -> Record:
    return dataclasses.replace(record, sites={name: record.sites[name] for name in names})
