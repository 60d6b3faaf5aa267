"""The verb train."""

from __future__ import annotations

import warnings
from typing import Any

import typer

from reparam.cli.config_options import with_options
from reparam.cli.options import ConfigFile, console
from reparam.evaluation.terminal import say


@with_options
def train(
    config: ConfigFile = None,
    overrides: Any = None,
) -> None:
    """Train an adapter, check the saved adapter, and print held-out scores before and after.

    Rows are {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}, one JSON object per line.
    The loss counts answer tokens only. A second call with the same output folder continues from its newest checkpoint.

    [bold]reparam train --base.path ./model --data.train rows.jsonl --method.r 16 --run.output out/first[/bold]
    """
    from reparam.train import processes
    from reparam.train.config import resolve

    if processes.count() > 1:
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # transformers sets it
    if processes.rank() > 0:
        warnings.simplefilter("ignore")
        console.quiet = True
    resolved = resolve(config, overrides)
    base, rows = resolved.base.path, ", ".join(resolved.data.sources())
    if base and rows:
        line = f"training {resolved.method.name} on {base} with {rows}; results go to {resolved.run.output}"
        say(console, line)
    # These import transformers, which takes seconds.
    from reparam.train.run import train as run
    from reparam.train.show import Show

    result = run(resolved, show=Show(console))
    if result.signal is not None:
        say(console, f"stopped by a signal; run the same command to continue from the checkpoint in {result.folder}")
        raise typer.Exit(128 + result.signal)
