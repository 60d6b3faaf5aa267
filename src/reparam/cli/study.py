"""Verb that measures a task: intrinsic."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from reparam.cli.config_options import with_options
from reparam.cli.options import ConfigFile, console
from reparam.core.checks import numbers
from reparam.errors import ConfigError
from reparam.evaluation.terminal import say
from reparam.train.config import resolve


@with_options
def intrinsic(
    config: ConfigFile = None,
    grid: Annotated[str, typer.Option(help="Smallest and largest number of dimensions: 10:10000.")] = "10:10000",
    each: Annotated[int, typer.Option(help="Number of sizes per factor of ten in the grid.")] = 2,
    rates: Annotated[
        str,
        typer.Option(help="Learning rates to try at each size, given for d = 1000; they are scaled by √(1000/d)."),
    ] = "1e-2,3e-2",
    full_rates: Annotated[
        str, typer.Option("--full-rates", help="Learning rates to try for full fine-tuning; the best one counts.")
    ] = "1e-4,3e-4,1e-3",
    maps: Annotated[int, typer.Option(help="Number of random maps to try at each size, with its best rate.")] = 1,
    metric: Annotated[
        str,
        typer.Option(
            help="exact: share of exact answers; saved: decrease of the loss from the base's; auto: chosen by the rows."
        ),
    ] = "auto",
    share: Annotated[float, typer.Option(help="Share of full fine-tuning's metric to reach.")] = 0.9,
    chance: Annotated[
        float, typer.Option(help="With exact: score of guessing, such as 0.5 for two balanced classes.")
    ] = 0,
    tolerance: Annotated[
        float, typer.Option(help="Stop once d90 is at most this many times the largest size that fails.")
    ] = 1.25,
    overrides: Any = None,
) -> None:
    """Measure d90, the fewest dimensions that reach 90 % of full fine-tuning, and suggest a LoRA rank from it.

    Options of `train` apply to all runs. A second call with the same output continues where the first one stopped.

    [bold]reparam intrinsic --base ./model --data rows.jsonl --grid 10:10000 --max_steps 200 -o out/d90[/bold]
    """
    from reparam.recipes.intrinsic import SearchPlan, intrinsic_to
    from reparam.recipes.subspace import grid as sizes

    taken = {"method.d": "--grid", "optim.learning_rate": "--rates"}
    clash = [f"--{key}: use {instead} instead" for key, instead in taken.items() if key in overrides]
    if clash:
        raise ConfigError("; ".join(clash))
    plan = SearchPlan(
        sizes(grid, each),
        numbers(rates, "--rates"),
        numbers(full_rates, "--full-rates"),
        maps=maps,
        metric=metric,
        share=share,
        chance=chance,
        tolerance=tolerance,
    )
    found = intrinsic_to(resolve(config, {"method.name": "intrinsic", **overrides}), plan, console=console)
    if found.signal is not None:
        say(console, "stopped by a signal; run the same command to continue")
        raise typer.Exit(128 + found.signal)
