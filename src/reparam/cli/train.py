"""The verb train."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from reparam.cli.config_options import ALIASES, with_options
from reparam.cli.options import ConfigFile, console
from reparam.errors import ConfigError
from reparam.evaluation.terminal import say, say_line


@with_options
def train(
    config: ConfigFile = None,
    foreign: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Configuration of LLaMA-Factory, Axolotl, TRL or torchtune (YAML); options override it."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", "--dry_run", help="Show the resolved configuration and what would be trained; stop."),
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print progress and result as lines of JSON, and nothing else.")
    ] = False,
    planned: Annotated[
        bool,
        typer.Option("--plan/--no-plan", help="Plan memory, and try the longest batch first."),
    ] = True,
    overrides: Any = None,
) -> None:
    """Train an adapter, check it, and print held-out scores before and after.

    Rows are {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}, one JSON object per line.
    The loss counts answer tokens only. A second call with the same output folder continues from its newest checkpoint.

    [bold]reparam train --base.path ./model --data.train rows.jsonl --method.r 16 --run.output out/first[/bold]
    """
    from reparam.train import processes
    from reparam.train.config import check_inputs, resolve

    if processes.count() > 1:
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # transformers sets it
    if processes.rank() > 0:
        warnings.simplefilter("ignore")
        console.quiet = True
    words = Console(quiet=True) if json else console
    if foreign is not None:
        overrides = {**_converted(foreign, config, words), **overrides}
    resolved = resolve(config, overrides)
    check_inputs(resolved)
    if not dry_run:
        base, rows = resolved.base.path, ", ".join(resolved.data.sources())
        say(words, f"training {resolved.method.name} on {base} with {rows}; results go to {resolved.run.output}")
    # These import transformers, which takes seconds.
    from reparam.train.run import rehearse
    from reparam.train.run import train as run
    from reparam.train.show import Show
    from reparam.train.show_json import ShowJson

    show = ShowJson(console) if json else Show(console)
    if dry_run:
        rehearse(resolved, show=show)
        return
    from reparam.plan.watch import Watch

    watch = Watch(show) if planned else None
    try:
        result = run(resolved, show=show, watch=watch)
    except Exception as error:
        if watch is not None:
            watch.explain(error)
        raise
    if result.signal is not None:
        if json:
            say_line(console, {"event": "stopped", "signal": result.signal, "folder": str(result.folder)})
        say(words, f"stopped by a signal; run the same command to continue from the checkpoint in {result.folder}")
        raise typer.Exit(128 + result.signal)


def _converted(file: Path, config: Path | None, console: Console) -> dict[str, Any]:
    """The settings in a file of another tool. Prints what it took from the tool, and what has no counterpart."""
    from reparam.train.foreign.convert import convert

    if config is not None:
        raise ConfigError("--from and --config each name a whole configuration; leave one of them out")
    names = {name.lstrip("-"): key for key, aliases in ALIASES.items() for name in aliases}
    found = convert(file, names)
    say(console, f"{file} is read as a configuration of {found.tool}")
    if found.defaults:
        say(console, f"defaults of {found.tool}: {', '.join(found.defaults)}")
    for line in found.notes:
        say(console, line)
    return found.settings
