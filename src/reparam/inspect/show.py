"""`reparam inspect`: a summary of an adapter, or of a quantized model, as a terminal table or as JSON."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.table import Table

from reparam.adapter.context import tasks_of
from reparam.adapter.quantize import QuantizeReport, entries, reports, size
from reparam.core.text import counted
from reparam.data.encode import encode
from reparam.data.rows import read_rows
from reparam.evaluation.terminal import note, say, say_json
from reparam.hf.models import load_base, vocabulary
from reparam.hf.open import frame_of, open_model
from reparam.hf.tasks import own_head
from reparam.inspect import details as closely
from reparam.inspect import geometry, ranks, routing
from reparam.inspect.summary import SiteSummary, Summary, summarize
from reparam.io import files
from reparam.io.files import adapter_folder
from reparam.io.outputs import check_files

PLOTS = ("ranks.png", "directions.png", "routing.png", *closely.PLOTS)


def show(
    folder: Path,
    base: str | None,
    console: Console,
    *,
    json: bool = False,
    plot: Path | None = None,
    probe: Path | None = None,
    asked: closely.Closely = closely.Closely(),  # noqa: B008  (frozen)
    overwrite: bool = False,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Print a summary of an adapter's folder or, for a model's folder, its quantized matrices and their bytes.

    `asked` selects further analyses of an adapter. `plot` is a folder for PNGs: a map of ranks; with the base, changes
    of magnitudes and directions; and plots of the analyses. With `probe`, a file of rows, print how the routers of a
    mixture use its experts on these rows instead of the summary. JSON also gets the values of `more`.

    Raises FormatError for a folder without a complete adapter or model. Raises ValueError if `plot`, `probe` or `asked`
    does not apply to the folder, and if `plot` is a file or, without `overwrite`, has plots.
    """
    if plot is not None and _holds_model(folder):
        raise ValueError(f"--plot is for adapters, and {folder} is a model; leave --plot out")
    if plot is not None:
        check_files(plot, PLOTS, overwrite=overwrite)
    if asked and (probe is not None or _holds_model(folder)):
        raise ValueError(
            "--deep, --survival, --against and --suggest are for adapters only, and not together with --probe"
        )
    if probe is not None:
        _show_routing(folder, base, probe, console, json=json, plot=plot)
        return
    if _holds_model(folder):
        _show_model(folder, console, json=json, more=more)
        return
    model = load_base(base, head=files.read(adapter_folder(folder)).head) if base else None
    summary = summarize(adapter_folder(folder), model)
    seen = closely.look(asked, adapter_folder(folder), base, model)
    if plot is not None:
        _plot(summary, plot)
        closely.draw(seen, plot)
    if json:
        told = dataclasses.asdict(summary) | {"correlation": summary.correlation}
        for site in told["sites"]:
            site["moved"] = site["moved"] and site["moved"]._asdict()
        say_json(console, told | closely.as_json(asked, seen) | dict(more))
        return
    settings = ", ".join(
        f"{key}={value if not isinstance(value, dict) or len(value) < 5 else f'{len(value)} entries'}"
        for key, value in summary.settings.items()
        if value not in (None, {})
    )
    say(console, note(summary.method, f"in {summary.format} format: {settings}", "bold"))
    say(console, f"base        {summary.base}")
    if summary.task != "causal":
        classes = f"; {counted(len(summary.labels), 'class', 'classes')}: {', '.join(summary.labels)}"
        say(console, f"task        {summary.task}{classes if summary.labels else ''}")
    say(console, f"parameters  {summary.parameters:,} in {counted(summary.bytes, 'byte')}")
    say(console, _table(summary))
    found = _ranks(summary)
    if found is not None and len(set(found.ranks.values())) > 1:
        say(console, ranks.table(found))
    if summary.correlation is not None:
        say(
            console,
            f"correlation of ΔM and ΔD over the sites: {summary.correlation:+.2f} (in DoRA's paper: full fine-tuning "
            f"-0.62, LoRA +0.83, DoRA -0.31)",
        )
    if base is None and any(site.rank is not None and site.change is None for site in summary.sites):
        say(console, "|ΔW| depends on W for this method; to show it, pass --base")
    closely.show(asked, seen, adapter_folder(folder), console)
    if plot is not None:
        say(console, f"plots are in {plot}")
    for module in summary.replaced:
        say(console, f"replaces the whole module {module}")
    if summary.idle:
        say(console, "This adapter changes nothing: B·A is zero at every site.", style="bold red")


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").exists() and not (folder / "adapter_config.json").exists()


def _ranks(summary: Summary) -> ranks.RankMap | None:
    known = {site.name: site.rank for site in summary.sites if site.rank is not None}
    return ranks.rank_map(known) if known else None


def _plot(summary: Summary, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if (found := _ranks(summary)) is not None:
        ranks.plot(found, folder / "ranks.png")
    moved = {site.name: site.moved for site in summary.sites if site.moved is not None}
    if moved:
        geometry.plot(moved, folder / "directions.png")


def _show_routing(
    folder: Path, base: str | None, probe: Path, console: Console, *, json: bool, plot: Path | None
) -> None:
    model, tokenizer, adapter = open_model(base, folder)
    assert adapter is not None
    rows = list(frame_of(tokenizer, adapter).rows(read_rows(probe)))
    encoded = encode(rows, tokenizer, max_length=1024, vocab_size=vocabulary(model), tasks=tasks_of(model))
    found = routing.routing(adapter, encoded, tokenizer)
    if plot is not None:
        plot.mkdir(parents=True, exist_ok=True)
        routing.plot(found, plot / "routing.png")
    if json:
        say_json(console, [dataclasses.asdict(use) for use in found])
        return
    table = Table()
    for column in ("router", "load", "mean weight", "entropy", "redundancy"):
        table.add_column(column, justify="left" if column == "router" else "right", overflow="fold")
    for use in found:
        shares = (" ".join(f"{share:.2f}" for share in shares) for shares in (use.load, use.weight))
        likeness = "-" if use.redundancy is None else f"{use.redundancy:.2f}"
        table.add_row(use.scope, *shares, f"{use.entropy:.2f}", likeness)
    say(console, table)
    if plot is not None:
        say(console, f"plots are in {plot}")


def _show_model(folder: Path, console: Console, *, json: bool, more: Mapping[str, Any]) -> None:
    model = load_base(str(folder), head=own_head(str(folder)))
    found = reports(model)
    if json:
        told = [
            {"storage": r.storage.name, "settings": r.storage.settings(), "bits for each entry": r.bits}
            | {"sites": [dataclasses.asdict(site) for site in r.sites], "dense": r.left}
            for r in found
        ]
        say_json(console, {"quantized": told, **more} if more else told)
        return
    held = sum(p.nbytes for p in model.parameters())
    say(console, note(f"{type(model).__name__}:", f"{counted(entries(model), 'parameter')} in {size(held)}", "bold"))
    for report in found:
        say(console, str(report))
        say(console, _quantized_table(report))
    if not found:
        say(console, "no matrix is quantized; reparam quantize makes a quantized copy")


def _quantized_table(report: QuantizeReport) -> Table:
    """Table with one row for all matrices of the same size whose paths end in the same name."""
    groups: dict[tuple[str, int, int, int], int] = {}
    for site in report.sites:
        key = site.name.rsplit(".", 1)[-1], site.entries, site.bytes, site.before
        groups[key] = groups.get(key, 0) + 1
    table = Table()
    for column in ("quantized", "count", "entries each", "bytes each", "bits per entry", "of dense"):
        table.add_column(column, justify="left" if column == "quantized" else "right")
    for (name, size_, held, dense), count in groups.items():
        bits = f"{8 * held / size_:.9g}"
        table.add_row(name, str(count), f"{size_:,}", f"{held:,}", bits, f"{held / dense:.1%}")
    return table


def _table(summary: Summary) -> Table:
    table = Table()
    compared = any(site.weight for site in summary.sites)
    for column in ("site", "W (out x in)", "rank", "|ΔW|", *(["|ΔW| / |W|"] if compared else [])):
        table.add_column(column, justify="left" if column == "site" else "right")
    for name, sites in _together(summary.sites).items():
        ranks = sorted({site.rank for site in sites if site.rank is not None})
        rank = "-" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        changes, weights = (_norm([getattr(site, part) for site in sites]) for part in ("change", "weight"))
        whole = dataclasses.replace(sites[0], change=changes, weight=weights)
        change = "-" if whole.change is None else f"{whole.change:.4g}"
        shape = f"{whole.shape[0]} x {whole.shape[1]}"
        table.add_row(name, shape, rank, change, *([_share(whole)] if compared else []))
    return table


def _together(sites: Sequence[SiteSummary]) -> dict[str, list[SiteSummary]]:
    """The sites by name; those of the experts of one module are together, by a name that counts them."""
    found: dict[str, list[SiteSummary]] = {}
    for site in sites:
        found.setdefault(re.sub(r"(\.experts)\.\d+\.", r"\1.*.", site.name), []).append(site)
    return {name if len(own) == 1 else f"{name} ({len(own)} experts)": own for name, own in found.items()}


def _norm(values: Sequence[float | None]) -> float | None:
    """The norm of matrices together from the norm of each; None if one is not known."""
    known = [value for value in values if value is not None]
    return math.hypot(*known) if len(known) == len(values) else None


def _share(site: SiteSummary) -> str:
    return f"{site.change / site.weight:.2%}" if site.change is not None and site.weight else "-"
