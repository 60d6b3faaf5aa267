"""Terminal tables of the results of `deep.py` and `suggest.py`, with a row for each site.

Above `MOST` sites, a row stands for the sites of one name in all layers, and has the lowest and highest value of each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table

from reparam.adapter.fold import SiteMerge
from reparam.inspect.amplification import Amplification
from reparam.inspect.similarity import Similarity
from reparam.inspect.spectrum import Spectrum
from reparam.inspect.suggest import Suggestion

MOST = 60  # rows of a table
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
    rows: dict[str, Sequence[str]] = {}
    for name, seen in found.items():
        needed = ["more" if (n := seen.needed(share)) is None else str(n) for share in (0.9, 0.99)]
        ends = [f"{float(seen.values[at]):.3g}" for at in (0, seen.rank - 1)] if seen.rank else ["0", "0"]
        effective = [] if part else [f"{seen.effective:.2f}"]
        rank = "full" if seen.kind == "leading" else str(seen.rank)
        held = [f"{seen.held:.1%}"] if part else []
        rows[name.removeprefix(begin)] = [rank, *effective, f"{seen.stable:.2f}", *needed, *ends, *held]
    return _filled(table, rows)


def amplification(found: Mapping[str, Amplification]) -> Table:
    """Table of |ΔW| and of the norm of W in the directions of ΔW, in random directions and in its own leading ones."""
    table, begin = _table("amplification", found, ["r", "|ΔW|", "in ΔW's", "in random", "in W's", "factor"])
    rows: dict[str, Sequence[str]] = {}
    for name, seen in found.items():
        sizes = (f"{size:.3g}" for size in (seen.change, seen.own, seen.random, seen.top))
        factor = "-" if seen.factor is None else f"{seen.factor:.3g}"
        rows[name.removeprefix(begin)] = [str(seen.r), *sizes, factor]
    return _filled(table, rows)


def survival(found: Mapping[str, Mapping[str, SiteMerge]], total: Mapping[str, float]) -> Table:
    """Table of the share of ΔW that a merge into each storage would keep, by site and for all sites together."""
    kinds = list(total)
    table, begin = _table(
        "share of ΔW that a merge would keep", found, [SHORT.get(kind, kind.replace(" ", "\n")) for kind in kinds]
    )
    rows: dict[str, Sequence[str]] = {}
    for name, here in found.items():
        rows[name.removeprefix(begin)] = [f"{here[kind].survival:.4f}" if kind in here else "-" for kind in kinds]
    _filled(table, rows)
    table.add_section()
    table.add_row("all sites", *(f"{total[kind]:.4f}" for kind in kinds))
    return table


def similarity(found: Mapping[str, Similarity]) -> Table:
    """Table of φ for the first directions, for all directions and for random ones, on the input and output side."""
    columns = [f"{side}\n{value}" for side in ("reads", "writes") for value in ("φ(1,1)", "φ(R,R')", "random")]
    table, begin = _table("directions in common", found, columns)
    rows: dict[str, Sequence[str]] = {}
    for name, seen in found.items():
        values = (seen.first, seen.whole, seen.random)
        rows[name.removeprefix(begin)] = [f"{value[side]:.3f}" for side in (1, 0) for value in values]
    return _filled(table, rows)


def suggestion(found: Suggestion) -> Table:
    """Table of the suggested rank of each site that changes; those that save most bytes come first."""
    names = [site.name for site in found.sites]
    columns = ["rank", "bytes saved", "lost, this site", "lost, all sites"]
    table, begin = _table("suggested ranks (lost: share of |ΔW|²)", names, columns)
    rows: dict[str, Sequence[str]] = {}
    for site in found.sites:
        rank = f"{site.before} -> {site.rank}" if site.rank else f"{site.before} -> drop"
        cells = [rank, f"{site.saved:,}", f"{site.lost:.2%}", f"{site.of_all:.3%}"]
        rows[site.name.removeprefix(begin)] = cells
    return _filled(table, rows)


def _table(title: str, names: Iterable[str], columns: Sequence[str]) -> tuple[Table, str]:
    begin = stem(names)
    table = Table(title=title, title_justify="left", pad_edge=False)
    table.add_column(f"site in {begin.removesuffix('.')}" if begin else "site", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table, begin


def _filled(table: Table, rows: Mapping[str, Sequence[str]]) -> Table:
    """Add the rows, those of the same module in all layers as one if there are too many."""
    if len(rows) <= MOST:
        for name, cells in rows.items():
            table.add_row(name, *cells)
        return table
    groups: dict[str, list[Sequence[str]]] = {}
    for name, cells in rows.items():
        groups.setdefault(re.sub(r"(?<![^.])\d+(?=\.)", "*", name), []).append(cells)
    for name, alike in groups.items():
        many = f"{name} ({len(alike)})" if len(alike) > 1 else name
        table.add_row(many, *(_span(column) for column in zip(*alike, strict=True)))
    table.caption = f"{len(rows):,} sites: a row with * has the range over all layers; --json has every site"
    table.caption_justify = "left"
    return table


def _span(cells: Sequence[str]) -> str:
    """The lowest and the highest of these values.

    >>> _span(["1,200", "80"]), _span(["5 %", "5 %"]), _span(["8 -> 2", "8 -> drop"])
    ('80–1,200', '5 %', '8 -> 2–8 -> drop')
    """

    def value(cell: str) -> float:
        found = re.findall(r"-?[\d,.]+(?:e[+-]?\d+)?", cell)
        return float(found[-1].replace(",", "")) if found else float("inf")

    low, high = min(cells, key=value), max(cells, key=value)
    return low if low == high else f"{low}–{high}"
