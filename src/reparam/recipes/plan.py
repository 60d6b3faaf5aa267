"""`reparam plan`: what a run will hold, whether it fits, and what would make it fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from reparam.core.text import sized
from reparam.data.preferences import flat
from reparam.evaluation.terminal import say, say_line
from reparam.plan.device import bytes_of, memory, speed
from reparam.plan.draw import draw
from reparam.plan.estimate import Plan, plan
from reparam.plan.longest import Longest, longest, longest_text
from reparam.train.config import Config
from reparam.train.data import read_data
from reparam.train.objectives import objective_of
from reparam.train.reading import tokenizer_of


def plan_run(
    config: Config, *, console: Console, available: str | None = None, plot: Path | None = None, as_json: bool = False
) -> Plan:
    """Print the plan of a run, and return it.

    Args:
        config: the run; `data.train` may be missing, and then rows of `data.max_length` tokens are assumed.
        console: where to print.
        available: amount of memory, such as "24GiB"; None for that of the device.
        plot: file for a picture, a PNG.
        as_json: print JSON.

    Raises ConfigError for wrong settings, BaseError if the base has no readable configuration, and DataError for rows
    that cannot be read.
    """
    where, limit = ("--memory", bytes_of(available)) if available is not None else memory()
    found = plan(config, _longest(config), limit=limit)
    rate = speed()
    if as_json:
        say_line(console, _plain(found, rate, where))
    else:
        _show(found, rate, where, console)
    if plot is not None:
        draw(found, plot)
        if not as_json:
            say(console, f"picture        {plot}")
    return found


def _longest(config: Config) -> Longest:
    if not config.data.train or config.data.packing or config.data.streaming:
        return longest(config)
    if config.run.task != "causal":
        found = objective_of(config).data(config, tokenizer_of(config))
        return longest_text(config, found.train.report.longest)
    return longest(config, flat(read_data(config, tokenizer_of(config)).train))


def _plain(found: Plan, rate: float, where: str) -> dict[str, Any]:
    return {
        "rows": found.batch.rows,
        "tokens": found.batch.tokens,
        "tokens from": found.batch.source,
        "peak": found.peak.total,
        "parts": dict(found.peak.parts),
        "limit": found.limit,
        "limit from": where,
        "fits": found.fits,
        "largest": dict(found.largest),
        "changes": [{"key": c.key, "value": c.value, "peak": c.peak} for c in found.changes],
        "flops": found.flops,
        "seconds": found.flops / rate,
    }


def _show(found: Plan, rate: float, where: str, console: Console) -> None:
    total = found.peak.total
    table = Table(title=f"memory at the peak of a step: {sized(total)}", title_justify="left")
    for name in ("for", "bytes", "share"):
        table.add_column(name, justify="left" if name == "for" else "right")
    for name, size in sorted(found.peak.parts.items(), key=lambda part: -part[1]):
        table.add_row(name, sized(size), f"{size / total:.0%}")
    say(console, table)
    say(console, f"batch          {found.batch} ({found.batch.source})")
    seconds = found.flops / rate
    say(console, f"step           {found.flops:.2g} operations, at least {seconds:.2g} s at the speed of this device")
    if found.limit is not None:
        word = "fits" if found.fits else "does not fit"
        say(console, f"{word} into {sized(found.limit)} ({where})")
        for key, most in found.largest.items():
            say(console, f"largest        {key} {most:,}" if most else f"largest        no {key} fits")
    for change in found.changes:
        say(console, f"with           {change.key} {change.said}: {sized(change.peak)}")
