"""Write a compressed copy of an adapter to a folder, and print its approximation error."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from reparam.adapter.quantize import size
from reparam.combine.compress import Compression, compress
from reparam.core.text import counted
from reparam.evaluation.evaluate import shrunk
from reparam.evaluation.tables import scores_table
from reparam.evaluation.terminal import say
from reparam.io import files
from reparam.io.outputs import check_adapter_folder

SHOWN = 12  # sites in the table: those with the largest absolute errors


def compress_to(
    output: Path,
    adapter: str,
    *,
    energy: float | None = None,
    rank: int | None = None,
    bytes: int | None = None,
    data: Path | None = None,
    base: str | None = None,
    dtype: str = "auto",
    max_length: int = 1024,
    batch: int = 16,
    format: str = "reparam",
    overwrite: bool = False,
    console: Console,
) -> Compression:
    """Compress and write the adapter, and print the error of each site.

    With `data`, also print held-out scores before and after. Raises ValueError if `output` is the adapter's folder, and
    if it is not empty, unless `overwrite` is set and it holds an adapter; and the errors of `compress`.
    """
    folder = files.adapter_folder(adapter)
    if output.resolve() == folder.resolve():
        raise ValueError(f"{output}: is the folder of the input adapter; give another folder as output")
    check_adapter_folder(output, format, overwrite=overwrite)
    found = compress(files.read(folder), energy=energy, rank=rank, bytes=bytes)
    found.save(output, format=format)
    _print(found, console)
    if data is not None:
        before, after = shrunk(data, base, folder, found.record, dtype=dtype, max_length=max_length, batch=batch)
        say(console, scores_table(before, after, names=("original", "compressed")))
    say(console, f"adapter        {output}")
    return found


def _print(found: Compression, console: Console) -> None:
    changed = [site for site in found.sites if site.rank != site.before]
    scaled = found.record.method.magnitude_axis is not None
    what = "B A, which the magnitudes scale," if scaled else "the change ΔW"
    if not changed:
        say(console, "every site keeps its rank: the adapter was copied bit for bit")
        return
    say(console, _table(found))
    before, after = (sum(ranks) for ranks in zip(*((s.before, s.rank) for s in found.sites), strict=True))
    gone = sum(not site.rank for site in found.sites)
    left = (
        f", {gone} of {counted(len(found.sites), 'site')} dropped"
        if gone
        else f" on {counted(len(found.sites), 'site')}"
    )
    say(
        console,
        f"components     {before:,} -> {after:,}{left}\n"
        f"tensors        {size(found.before)} -> {size(found.bytes)} ({found.bytes / found.before:.1%})\n"
        f"error          {found.error:.4f} of {what} over all sites; {1 - found.error**2:.4f} of its energy is kept",
    )


def _table(found: Compression) -> Table:
    worst = sorted((s for s in found.sites if s.rank != s.before), key=lambda site: -site.lost)
    more = len(worst) - SHOWN
    table = Table(caption=f"and {counted(more, 'more site')} with smaller errors" if more > 0 else None)
    for name in ("site", "rank", "|B A|", "error", "bytes saved"):
        table.add_column(name, justify="left" if name == "site" else "right", overflow="fold")
    for site in worst[:SHOWN]:
        rank = f"{site.before} -> {site.rank}"
        table.add_row(site.name, rank, f"{site.change:.4g}", f"{site.error:.4f}", f"{site.saved:,}")
    return table
