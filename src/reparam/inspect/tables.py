"""Terminal tables of the results of `deep.py` and `suggest.py`, with a row for each site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table

from reparam.adapter.fold import SiteMerge
from reparam.inspect.amplification import Amplification
from reparam.inspect.similarity import Similarity
from reparam.inspect.spectrum import Spectrum
from reparam.inspect.suggest import Suggestion

SHORT = {"bfloat16": "bf16", "float16": "fp16"}


def stem(names: Iterable[str]) -> str:
    """The prefix that the paths of all sites share, up to and including a dot; tables leave it out.

    >>> stem(["model.layers.0.q", "model.layers.10.q"])
    'model.layers.'
    """
    paths = [name.split(".")[:-1] for name in names]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "".join(f"{part}." for part in shared)


def spectra(found: Mapping[str, Spectrum]) -> Table:
    """Table of each site's rank, effective and stable rank, and singular values."""
    part = any(seen.kind == "leading" for seen in found.values())
    columns = ["rank", *([] if part else ["eff."]), "stable", "90 %", "99 %", "σ1", "σ last"]
    title = "singular values (eff.: effective rank; 90 %: count for 90 % of |ΔW|²)"
    table, begin = _table(title, found, [*columns, *(["held"] if part else [])])
    for name, seen in found.items():
        needed = ["more" if (n := seen.needed(share)) is None else str(n) for share in (0.9, 0.99)]
        ends = [f"{float(seen.values[at]):.3g}" for at in (0, seen.rank - 1)] if seen.rank else ["0", "0"]
        effective = [] if part else [f"{seen.effective:.2f}"]
        rank = "full" if seen.kind == "leading" else str(seen.rank)
        held = [f"{seen.held:.1%}"] if part else []
        table.add_row(name.removeprefix(begin), rank, *effective, f"{seen.stable:.2f}", *needed, *ends, *held)
    return table


def amplification(found: Mapping[str, Amplification]) -> Table:
    """Table of |ΔW| and of the norm of W in the directions of ΔW, in random directions and in its own leading ones."""
    table, begin = _table("amplification", found, ["r", "|ΔW|", "in ΔW's", "in random", "in W's", "factor"])
    for name, seen in found.items():
        sizes = (f"{size:.3g}" for size in (seen.change, seen.own, seen.random, seen.top))
        factor = "-" if seen.factor is None else f"{seen.factor:.3g}"
        table.add_row(name.removeprefix(begin), str(seen.r), *sizes, factor)
    return table


def survival(found: Mapping[str, Mapping[str, SiteMerge]], total: Mapping[str, float]) -> Table:
    """Table of the share of ΔW that a merge into each storage would keep, by site and for all sites together."""
    kinds = list(total)
    table, begin = _table(
        "share of ΔW that a merge would keep", found, [SHORT.get(kind, kind.replace(" ", "\n")) for kind in kinds]
    )
    for name, here in found.items():
        cells = (f"{here[kind].survival:.4f}" if kind in here else "-" for kind in kinds)
        table.add_row(name.removeprefix(begin), *cells)
    table.add_section()
    table.add_row("all sites", *(f"{total[kind]:.4f}" for kind in kinds))
    return table


def similarity(found: Mapping[str, Similarity]) -> Table:
    """Table of φ for the first directions, for all directions and for random ones, on the input and output side."""
    columns = [f"{side}\n{value}" for side in ("reads", "writes") for value in ("φ(1,1)", "φ(R,R')", "random")]
    table, begin = _table("directions in common", found, columns)
    for name, seen in found.items():
        cells = [f"{value[side]:.3f}" for side in (1, 0) for value in (seen.first, seen.whole, seen.random)]
        table.add_row(name.removeprefix(begin), *cells)
    return table


def suggestion(found: Suggestion) -> Table:
    """Table of the suggested rank of each site that changes; those that save most bytes come first."""
    names = [site.name for site in found.sites]
    columns = ["rank", "bytes saved", "lost, this site", "lost, all sites"]
    table, begin = _table("suggested ranks (lost: share of |ΔW|²)", names, columns)
    for site in found.sites:
        rank = f"{site.before} -> {site.rank}" if site.rank else f"{site.before} -> drop"
        table.add_row(site.name.removeprefix(begin), rank, f"{site.saved:,}", f"{site.lost:.2%}", f"{site.of_all:.3%}")
    return table


def _table(title: str, names: Iterable[str], columns: Sequence[str]) -> tuple[Table, str]:
    begin = stem(names)
    table = Table(title=title, title_justify="left", pad_edge=False)
    table.add_column(f"site in {begin.removesuffix('.')}" if begin else "site", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table, begin
