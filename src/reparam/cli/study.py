"""Verbs that study a task: intrinsic."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from reparam.cli.config_options import with_options
from reparam.cli.options import ConfigFile, console
from reparam.core.checks import numbers
from reparam.errors import ConfigError
from reparam.train.config import resolve


@with_options
def intrinsic(
    config: ConfigFile = None,
    grid: Annotated[str, typer.Option(help="From how many dimensions to how many.")] = "10:10000",
    each: Annotated[int, typer.Option(help="Sizes for every factor of ten of the grid.")] = 2,
    rates: Annotated[
        str,
        typer.Option(help="Learning rates that each size is tried with, for d = 1000; times √(1000/d)."),
    ] = "1e-2,3e-2",
    full_rates: Annotated[
        str, typer.Option("--full-rates", help="Learning rates of full fine-tuning, the best of which counts.")
    ] = "1e-4,3e-4,1e-3",
    maps: Annotated[int, typer.Option(help="Random maps that each size is tried with, at its best rate.")] = 1,
    metric: Annotated[
        str, typer.Option(help="exact: right answers; saved: loss below the base's; auto: by the rows.")
    ] = "auto",
    share: Annotated[float, typer.Option(help="Share of full fine-tuning's metric that is to be reached.")] = 0.9,
    chance: Annotated[float, typer.Option(help="With exact: what guessing reaches, 0.5 of two balanced classes.")] = 0,
    tolerance: Annotated[float, typer.Option(help="Ratio of d90 to the largest failing size.")] = 1.25,
    overrides: Any = None,
) -> None:
    """How many dimensions a task takes: d90, the fewest that reach 90 % of full fine-tuning, and a LoRA rank from it.

    Options of `train` apply to all runs. A second call with the same output goes on where the first one stopped.

    [bold]reparam intrinsic --base ./model --data rows.jsonl --grid 10:10000 --max_steps 200 -o out/d90[/bold]
    """
    from reparam.recipes.intrinsic import SearchPlan, intrinsic_to
    from reparam.recipes.subspace import grid as sizes

    taken = {"method.d": "--grid", "optim.learning_rate": "--rates"}
    clash = [f"--{key}: {instead} says that here" for key, instead in taken.items() if key in overrides]
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
        console.print("stopped by a signal; the same command goes on from here")
        raise typer.Exit(128 + found.signal)
