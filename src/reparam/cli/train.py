"""The verb train."""

from __future__ import annotations

from typing import Any

import typer

from reparam.cli.config_options import with_options
from reparam.cli.options import ConfigFile, console


@with_options
def train(
    config: ConfigFile = None,
    overrides: Any = None,
) -> None:
    """Train an adapter on JSONL rows, prove that it works, and print held-out scores before and after.

    Rows are {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}, one JSON object per line.
    Loss is on the answers only. A second call with the same output folder continues from its newest checkpoint.

    [bold]reparam train --base.path ./model --data.train rows.jsonl --method.r 16 --run.output out/first[/bold]
    """
    from reparam.train.config import resolve
    from reparam.train.run import train as run
    from reparam.train.show import Show

    result = run(resolve(config, overrides), show=Show(console))
    if result.signal is not None:
        console.print(f"stopped by a signal; the same command continues from the checkpoint in {result.folder}")
        raise typer.Exit(128 + result.signal)
