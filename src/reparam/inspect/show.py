"""`reparam inspect`: a summary as a terminal table or as JSON."""

from __future__ import annotations

import dataclasses
import json as json_
from pathlib import Path

from rich.console import Console
from rich.table import Table

from reparam.hf import load_base
from reparam.inspect.summary import SiteSummary, Summary, summarise
from reparam.open import adapter_folder


def show(adapter: Path, base: str | None, console: Console, *, json: bool = False) -> None:
    """Print what the adapter holds. Raises FormatError for a folder that holds no whole adapter."""
    summary = summarise(adapter_folder(adapter), load_base(base) if base else None)
    if json:
        console.print_json(json_.dumps(dataclasses.asdict(summary)))
        return
    settings = ", ".join(f"{key}={value}" for key, value in summary.settings.items() if value not in (None, {}))
    console.print(
        f"[bold]{summary.method}[/bold] in {summary.format} format: {settings}", highlight=False, soft_wrap=True
    )
    console.print(f"base        {summary.base}", highlight=False, soft_wrap=True)
    console.print(f"parameters  {summary.parameters:,} in {summary.bytes:,} bytes", highlight=False, soft_wrap=True)
    console.print(_table(summary))
    for module in summary.replaced:
        console.print(f"replaces {module} whole", highlight=False, soft_wrap=True)
    if summary.idle:
        console.print("[bold red]This adapter changes nothing: B·A is zero at every site.[/bold red]")


def _table(summary: Summary) -> Table:
    table = Table()
    compared = any(site.weight for site in summary.sites)
    for column in ("site", "W (out x in)", "rank", "|ΔW|", *(["|ΔW| / |W|"] if compared else [])):
        table.add_column(column, justify="left" if column == "site" else "right")
    for site in summary.sites:
        rank = "-" if site.rank is None else str(site.rank)
        change = "-" if site.change is None else f"{site.change:.4g}"
        shape = f"{site.shape[0]} x {site.shape[1]}"
        table.add_row(site.name, shape, rank, change, *([_share(site)] if compared else []))
    return table


def _share(site: SiteSummary) -> str:
    return f"{site.change / site.weight:.2%}" if site.change is not None and site.weight else "-"
