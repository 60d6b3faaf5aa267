"""`reparam plan`: what a run will hold, whether it fits, and what would make it fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from reparam.core.text import sized
from reparam.evaluation.terminal import say, say_line
from reparam.plan.device import bytes_of, memory, speed
from reparam.plan.draw import draw
from reparam.plan.estimate import Plan, plan
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
    tokens, told = _longest(config)
    found = plan(config, rows=config.run.batch_size, tokens=tokens, limit=limit)
    rate = speed()
    if as_json:
        say_line(console, _plain(found, rate, where, told))
    else:
        _show(found, rate, where, told, console)
    if plot is not None:
        draw(found, plot)
        if not as_json:
            say(console, f"picture        {plot}")
    return found


def _longest(config: Config) -> tuple[int, str]:
    """The tokens of the longest row that training would see, and where that is from."""
    most = config.data.max_length
    if config.data.packing:
        return most, "packs are full"
    if not config.data.train or config.data.streaming:
        return most, "data.max_length"
    if config.run.task != "causal":
        found = objective_of(config).data(config, tokenizer_of(config))
        return found.train.report.longest, "the longest text of the training rows"
    data = read_data(config, tokenizer_of(config))
    return int(data.train.lengths.max()), "the longest training row"  # type: ignore[union-attr]


def _plain(found: Plan, rate: float, where: str, told: str) -> dict[str, Any]:
    return {
        "rows": found.rows,
        "tokens": found.tokens,
        "tokens from": told,
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


def _show(found: Plan, rate: float, where: str, told: str, console: Console) -> None:
    total = found.peak.total
    table = Table(title=f"memory at the peak of a step: {sized(total)}", title_justify="left")
    for name in ("for", "bytes", "share"):
        table.add_column(name, justify="left" if name == "for" else "right")
    for name, size in sorted(found.peak.parts.items(), key=lambda part: -part[1]):
        table.add_row(name, sized(size), f"{size / total:.0%}")
    say(console, table)
    say(console, f"batch          {found.rows} x {found.tokens} tokens ({told})")
    seconds = found.flops / rate
    say(console, f"step           {found.flops:.2g} operations, at least {seconds:.2g} s at the speed of this device")
    if found.limit is not None:
        word = "fits" if found.fits else "does not fit"
        say(console, f"{word} into {sized(found.limit)} ({where})")
        for key, most in found.largest.items():
            say(console, f"largest        {key} {most:,}" if most else f"largest        no {key} fits")
    for change in found.changes:
        value = json.dumps(change.value) if not isinstance(change.value, str) else change.value
        say(console, f"with           {change.key} {value}: {sized(change.peak)}")
