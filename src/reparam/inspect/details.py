"""`reparam inspect --deep`, `--survival`, `--against` and `--suggest`: run the analyses; print, plot, or give JSON."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from torch import nn

from reparam.core.text import counted
from reparam.evaluation.evaluate import shrunk
from reparam.evaluation.score import Score
from reparam.evaluation.tables import scores_table
from reparam.evaluation.terminal import say
from reparam.inspect import figures, tables
from reparam.inspect.deep import SiteView, compared, view
from reparam.inspect.similarity import Similarity
from reparam.inspect.suggest import Suggestion, suggest
from reparam.inspect.survival import overall
from reparam.io import files


@dataclasses.dataclass(frozen=True)
class Closely:
    """Which analyses to run in addition to the summary."""

    deep: bool = False
    """Singular values of ΔW and, with the base, amplification."""
    survival: bool = False
    """Share of ΔW that a merge into each storage would keep; requires the base."""
    against: Path | None = None
    """Folder of another adapter of the same base."""
    suggest: float | None = None
    """Share of |ΔW|² to keep, between 0 and 1, for which smaller ranks are suggested."""
    data: Path | None = None
    """With `suggest`: File of held-out rows to score the suggestion on."""

    def __bool__(self) -> bool:
        return self.deep or self.survival or self.against is not None or self.suggest is not None


class Seen(NamedTuple):
    """Results of the analyses; empty or None for those that were not requested."""

    sites: tuple[SiteView, ...]
    similarity: dict[str, Similarity]
    suggestion: Suggestion | None
    scores: tuple[Sequence[Score], Sequence[Score]] | None


def look(asked: Closely, folder: Path, base: str | None, model: nn.Module | None) -> Seen:
    """Run the requested analyses on the adapter in `folder`. `base` is the name of its base, and `model` the base.

    Raises ValueError for `data` without `suggest` or `survival` without a base, and FormatError for adapters to which
    an analysis does not apply.
    """
    if asked.data is not None and asked.suggest is None:
        raise ValueError("--data is for --suggest: its rows score the suggestion; add --suggest or leave --data out")
    sites = view(folder, model, survival=asked.survival) if asked.deep or asked.survival else ()
    other = None if asked.against is None else files.adapter_folder(asked.against)
    alike = {} if other is None else compared(folder, other, model)
    found = (
        None
        if asked.suggest is None
        else suggest(files.read(folder).without_beside(folder), asked.suggest, label=str(folder))
    )
    scores = None
    if found is not None and asked.data is not None:
        small = found.compression.record
        scores = shrunk(asked.data, base, folder, small, dtype="auto", max_length=1024, batch=16)
    return Seen(sites, alike, found, scores)


def as_json(asked: Closely, seen: Seen) -> dict[str, Any]:
    """Return the results as plain values for JSON."""
    found: dict[str, Any] = {}
    if seen.sites:
        found["deep"] = [site.told() for site in seen.sites]
    if asked.survival:
        found["survival"] = overall([site.survival or {} for site in seen.sites])
    if asked.against is not None:
        found["similarity"] = [
            {"name": name, "left": alike.left.tolist(), "right": alike.right.tolist()}
            | {"random": dict(zip(("left", "right"), alike.random, strict=True))}
            for name, alike in seen.similarity.items()
        ]
    if seen.suggestion is not None:
        found["suggestion"] = {
            "sites": [dataclasses.asdict(site) for site in seen.suggestion.sites],
            "bytes before": seen.suggestion.before,
            "bytes": seen.suggestion.bytes,
            "kept": seen.suggestion.kept,
        }
    if seen.scores is not None:
        found["scores"] = {
            name: [dataclasses.asdict(score) for score in scores]
            for name, scores in zip(("original", "suggested"), seen.scores, strict=True)
        }
    return found


def show(asked: Closely, seen: Seen, folder: Path, console: Console) -> None:
    """Print the results as tables, with notes."""
    spectra = {site.name: site.spectrum for site in seen.sites if site.spectrum is not None}
    if asked.deep and spectra:
        say(console, tables.spectra(spectra))
        kinds = {spectrum.kind for spectrum in spectra.values()}
        if "low-rank part" in kinds:
            _line(
                console, "values of s B A, the change of the direction; ΔW also depends on W: to show it, pass --base"
            )
        if "leading" in kinds:
            _line(
                console,
                "ΔW has full rank, because a gain also scales W. The table has its leading values, each at most the "
                "true one, and the share of |ΔW|² that they hold",
            )
    if asked.deep and len(spectra) < len(seen.sites):
        count = len(seen.sites) - len(spectra)
        _line(console, f"no spectrum for {counted(count, 'site')}: ΔW depends on the input, or on W (then pass --base)")
    against = {site.name: site.amplification for site in seen.sites if site.amplification is not None}
    if asked.deep and against:
        say(console, tables.amplification(against))
        _line(
            console,
            "columns: norm of W in r leading directions of ΔW, in r random ones, and in W's own; factor: |ΔW| / \"in "
            "ΔW's\"",
        )
    if asked.survival:
        kept = {site.name: site.survival or {} for site in seen.sites}
        say(console, tables.survival(kept, overall(list(kept.values()))))
    if asked.against is not None:
        say(console, tables.similarity(seen.similarity))
    if seen.suggestion is not None:
        _show_suggestion(asked, seen.suggestion, folder, console)
    if seen.scores is not None:
        say(console, scores_table(*seen.scores, names=("original", "as suggested")))


PLOTS = ("spectra.png", "amplification.png", "survival.png", "similarity.png")


def draw(seen: Seen, folder: Path) -> None:
    """Write the results as PNGs: spectra, amplification, survival, similarity."""
    spectra = {site.name: site.spectrum for site in seen.sites if site.spectrum is not None and site.spectrum.rank}
    if spectra:
        figures.spectra(spectra, folder / "spectra.png")
    against = {site.name: site.amplification for site in seen.sites if site.amplification is not None}
    if against:
        figures.amplification(against, folder / "amplification.png")
    kept = [site.survival for site in seen.sites if site.survival]
    if kept:
        figures.survival(kept, overall(kept), folder / "survival.png")
    if seen.similarity:
        figures.similarity(seen.similarity, folder / "similarity.png")


def _show_suggestion(asked: Closely, found: Suggestion, folder: Path, console: Console) -> None:
    if not found.sites:
        _line(console, f"no rank can be reduced while keeping {asked.suggest:.6g} of |ΔW|²")
        return
    say(console, tables.suggestion(found))
    dropped = sum(not site.rank for site in found.sites)
    _line(
        console,
        f"{counted(dropped, 'site')} dropped, {len(found.sites) - dropped} shrunk: {found.before:,} -> "
        f"{found.bytes:,} bytes ({found.bytes / found.before:.1%}), {found.kept:.4f} of |ΔW|² kept",
    )
    _line(console, f"reparam compress {shlex.quote(str(folder))} OUTPUT --bytes {found.bytes}")


def _line(console: Console, text: str) -> None:
    say(console, text)
