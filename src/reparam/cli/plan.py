"""The verb plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from reparam.cli.config_options import with_options
from reparam.cli.options import ConfigFile, console


@with_options
def plan(
    config: ConfigFile = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory to fit into, such as 24GiB. By default, that of the device.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="File for a picture of the peak's parts, a PNG.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    overrides: Any = None,
) -> None:
    """Show what a training run will hold in memory, whether it fits, and what would make it fit.

    Takes the options of train. No weights are read, so a hub model is planned from its configuration alone.

    [bold]reparam plan --base.path ./model --data.train rows.jsonl --memory 24GiB[/bold]
    """
    from reparam.errors import ConfigError
    from reparam.train.config import resolve

    resolved = resolve(config, overrides)
    if not resolved.base.path:
        raise ConfigError("base.path must be set, as an option (--base.path ...) or in the configuration file")
    from reparam.recipes.plan import plan_run

    plan_run(resolved, console=console, available=memory, plot=plot, as_json=json)
