"""What the change of each site looks like: its spectrum, what it amplifies, what a merge would keep of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from reparam.adapter.merge import SiteMerge
from reparam.core.checks import listed
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
    """One site of an adapter, from close by."""

    name: str
    spectrum: Spectrum | None
    """None where no one matrix is the change."""
    amplification: Amplification | None
    """None without the base, and without a change."""
    survival: dict[str, SiteMerge] | None
    """By storage; None where it was not asked for."""

    def told(self) -> dict[str, Any]:
        """Plain values for JSON."""
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
    """All sites of the adapter in `folder`, ours or PEFT's. `model` is its base, plain, or None.

    With `survival`, also what merging into each storage would keep. Raises FormatError for a folder without a whole
    adapter, and ValueError for `survival` without a base.
    """
    if survival and model is None:
        raise ValueError("what a merge keeps depends on the base; give it too (--base)")
    record = files.read(folder)
    found = []
    for name, weight in weights(record, model).items():
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
    """What two adapters of one base have in common, by the sites that both change.

    Raises FormatError where there is no such site, or their matrices differ in size.
    """
    one, its = files.read(folder), files.read(other)
    shared = [name for name in one.sites if name in its.sites]
    if not shared:
        raise FormatError(
            f"{folder} and {other} change no site in common: {listed(list(one.sites), shown=2)} in one, "
            f"{listed(list(its.sites), shown=2)} in the other"
        )
    here, there = (spectra(_only(record, shared), model) for record in (one, its))
    found = {}
    for name in shared:
        if name in here and name in there:
            try:
                alike = similarity(here[name], there[name])
            except ValueError as error:
                raise FormatError(f"{name}: {error}; the adapters are of different bases") from None
            if alike is not None:
                found[name] = alike
    return found


def _only(record: Record, names: list[str]) -> Record:
    return dataclasses.replace(record, sites={name: record.sites[name] for name in names})
