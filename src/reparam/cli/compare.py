"""The verb compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from reparam.cli.config_options import with_options
from reparam.cli.options import console


@with_options
def compare(
    plan: Annotated[Path | None, typer.Argument(help="TOML file of the comparison; options come on top.")] = None,
    methods: Annotated[str | None, typer.Option(help="Names, separated by commas; settings go in the file.")] = None,
    ranks: Annotated[str | None, typer.Option(help="Ranks of every method that has one: 4,8.")] = None,
    storages: Annotated[str | None, typer.Option(help="dense, nf4, int8: how the base is kept.")] = None,
    rates: Annotated[str | None, typer.Option(help="Learning rates that each contestant is tuned over.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Scored runs of each contestant.")] = None,
    metric: Annotated[str | None, typer.Option(help="exact, loss or bits.")] = None,
    test: Annotated[str | None, typer.Option(help="JSONL file that scores are reported on.")] = None,
    rows: Annotated[str | None, typer.Option(help="Rows that are scored at most.")] = None,
    reference: Annotated[str | None, typer.Option(help="Who the others are compared with.")] = None,
    keep: Annotated[str | None, typer.Option(help="Share of the contestants that goes on after a rung.")] = None,
    minutes: Annotated[str | None, typer.Option(help="No run starts after this long.")] = None,
    parameters: Annotated[str | None, typer.Option(help="Contestants that train more are left out.")] = None,
    workers: Annotated[str, typer.Option(help="here, or ray: on a Ray cluster that runs already.")] = "here",
    overrides: Any = None,
) -> None:
    """Compare methods on your own task: tuned rates, seeds, intervals, costs, and a report with a recommendation.

    A second call with the same output goes on where the first one stopped. Options of `train` apply to all contestants.

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
