"""Write the weighted sum of saved adapters to a folder, and print its approximation error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from reparam.combine.blend import NOTHING, Blend, blend
from reparam.core.checks import numbers
from reparam.core.text import counted
from reparam.evaluation.terminal import say
from reparam.hf.models import load_base
from reparam.io.files import adapter_folder
from reparam.io.outputs import check_adapter_folder

SHOWN = 8  # sites in the table: those with the largest errors


def compose_to(
    output: Path,
    adapters: Sequence[str],
    weights: str | None,
    *,
    space: str = "delta",
    rank: int | None = None,
    density: float = 0.2,
    seed: int = 0,
    base: str | None = None,
    dtype: str = "auto",
    format: str = "reparam",
    overwrite: bool = False,
    console: Console,
) -> Blend:
    """Compute and write the weighted sum, and print the error of each site.

    `weights` are numbers separated by commas; the default is the mean, 1 / number of adapters each. Raises ValueError
    if a weight is not a number, if `output` is one of the adapters, and if it is not empty, unless `overwrite` is set
    and it holds an adapter; and the errors of `blend`. Also raises ValueError if the sum changes nothing.
    """
    folders = folders_of(adapters, output)
    check_adapter_folder(output, format, overwrite=overwrite)
    shares = [1 / len(folders)] * len(folders) if weights is None else numbers(weights, "--weights")
    model = load_base(base, dtype=dtype) if base is not None else None
    found = blend(folders, shares, space=space, rank=rank, density=density, seed=seed, base=model)
    write(found, output, folders, shares, format=format, console=console)
    return found


def folders_of(adapters: Sequence[str], output: Path) -> list[Path]:
    """The folders of the adapters, where training runs may be given. Raises ValueError if `output` is one of them."""
    folders = [adapter_folder(adapter) for adapter in adapters]
    if not folders:
        raise ValueError("no adapters are given")
    if output.resolve() in [folder.resolve() for folder in folders]:
        raise ValueError(f"{output}: is the folder of an input adapter; give another folder as output")
    return folders


def write(
    found: Blend, output: Path, folders: Sequence[Path], weights: Sequence[float], *, format: str, console: Console
) -> None:
    """Save the sum, and print its adapters and weights, the error of each site, and the output folder.

    Raises ValueError if the sum changes nothing.
    """
    if found.idle:
        raise ValueError(f"{NOTHING}; nothing was written")
    found.save(output, format=format)
    for folder, weight in zip(folders, weights, strict=True):
        say(console, f"{weight:+.4f} x {folder}")
    if not found.sites:
        say(console, "one adapter with weight 1: copied bit for bit")
    elif not found.error:
        where = f"any of {len(found.sites):,} sites" if len(found.sites) > 1 else "the one site"
        ranks = sorted({site.rank for site in found.sites})
        told = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        say(console, f"exact: no approximation error on {where}, {told}")
    else:
        say(console, _table(found))
        say(
            console,
            f"error over all sites: {found.error:.4f} of the norm of the exact sum; share of the sum that survives: "
            f"{found.survival:.4f} (1 is all)",
        )
    say(console, f"adapter        {output}")


def _table(found: Blend) -> Table:
    worst = sorted(found.sites, key=lambda site: -site.error)
    more = len(worst) - SHOWN
    table = Table(caption=f"and {counted(more, 'more site')} with smaller errors" if more > 0 else None)
    for name in ("site", "rank", "|ΔW|", "error"):
        table.add_column(name, justify="left" if name == "site" else "right")
    for site in worst[:SHOWN]:
        table.add_row(site.name, str(site.rank), f"{site.change:.4g}", f"{site.error:.4f}")
    return table
