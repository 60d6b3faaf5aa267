"""The verb compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import reparam.weights  # noqa: F401  (fills its registry)
from reparam.cli.config_options import with_options
from reparam.cli.options import console
from reparam.core.registry import STORAGES


@with_options
def compare(
    plan: Annotated[
        Path | None, typer.Argument(help="File of the comparison, TOML or YAML; options override it.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Names of methods, separated by commas. Their settings go into the file.")
    ] = None,
    ranks: Annotated[str | None, typer.Option(help="Ranks that every method with a rank is compared at: 4,8.")] = None,
    storages: Annotated[
        str | None, typer.Option(help=f"Storages of the base, separated by commas: {', '.join(STORAGES)}.")
    ] = None,
    rates: Annotated[str | None, typer.Option(help="Learning rates to tune each contestant over.")] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Number of scored runs of each contestant, each with its own seed.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="auto, exact (match of answers), loss, or bits (per byte).")
    ] = None,
    test: Annotated[str | None, typer.Option(help="File of the rows that the reported scores are computed on.")] = None,
    rows: Annotated[str | None, typer.Option(help="Maximum number of rows to score.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Label of the contestant that the others are compared with.")
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="Share of the contestants that continue after each rung of tuning.")
    ] = None,
    minutes: Annotated[str | None, typer.Option(help="Start no further run after this many minutes.")] = None,
    parameters: Annotated[
        str | None, typer.Option(help="Leave out contestants with more trained parameters than this.")
    ] = None,
    workers: Annotated[str, typer.Option(help="Where runs execute: here, or ray (a running Ray cluster).")] = "here",
    overrides: Any = None,
) -> None:
    """Compare methods on your own task: tuned rates, seeds, intervals, costs, and a report with a recommendation.

    A second call with the same output continues where the first one stopped. Options of `train` apply to every run.

    [bold]reparam compare --base ./model --data.train rows.jsonl --methods lora,dora --ranks 4,8 -o out/compare[/bold]
    """
    from reparam.compare.plan import read_plan
    from reparam.compare.run import compare as run
    from reparam.compare.workers import workers as made

    given = {
        "methods": methods,
        "ranks": ranks,
        "storages": storages,
        "rates": rates,
        "seeds": seeds,
        "metric": metric,
        "test": test,
        "rows": rows,
        "reference": reference,
        "keep": keep,
        "minutes": minutes,
        "parameters": parameters,
    }
    own = {f"compare.{key}": value for key, value in given.items() if value is not None}
    ended = run(read_plan(plan, {**overrides, **own}), workers=made(workers), console=console)
    if ended.signal is not None:
        raise typer.Exit(128 + ended.signal)
