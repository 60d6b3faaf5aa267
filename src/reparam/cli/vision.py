"""The verbs of a model that sees: pretrain, merge, tune."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from reparam.cli.config_options import with_options
from reparam.cli.help import Verb
from reparam.cli.options import ConfigFile, Dtype, Overwrite, console
from reparam.evaluation.terminal import say, say_line
from reparam.train.config import check_inputs
from reparam.vision.config import Stage, VisionConfig, resolve_stage

vision = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
    help="Teach a language model to see with adapters in its first blocks (VoRA), merge it, and tune it on "
    "instructions.",
)
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", "--dry_run", help="Show the resolved configuration and what would be trained; stop."),
]

Json = Annotated[bool, typer.Option("--json", help="Print progress and result as lines of JSON, and nothing else.")]


def pretrain(config: ConfigFile = None, dry_run: DryRun = False, json: Json = False, overrides: Any = None) -> None:
    """Teach a language model to see, on rows with images.

    Rows are {"image": "cat.png", "text": ...}, or those of train with "image" or "images": paths below the folder of
    the file, or base64. Mix in rows without images, which protect the text: --data.train captions.jsonl,text.jsonl
    --data.weights 0.83,0.17

    The adapter is LoRA of rank 64 and scale 1, unless the method's settings say otherwise.

    [bold]reparam vision pretrain --base.path ./model --data.train captions.jsonl --vision.teacher ./vit -o sees[/bold]
    """
    _run("pretrain", config, overrides, dry_run=dry_run, json=json)


def tune(config: ConfigFile = None, dry_run: DryRun = False, json: Json = False, overrides: Any = None) -> None:
    """Tune a merged model that sees, on instructions with and without images.

    The adapter goes on all blocks; --method full trains whole matrices.

    [bold]reparam vision tune --base.path ./merged --data.train instructions.jsonl -o out/tuned[/bold]
    """
    _run("tune", config, overrides, dry_run=dry_run, json=json)


def merge(
    output: Annotated[Path, typer.Argument(help="New folder for the merged model.")],
    run: Annotated[
        str, typer.Option("--from", "-f", help="Folder of the training run, or of the model that it wrote.")
    ],
    base: Annotated[
        str | None, typer.Option("--base", "-b", help="Base of the adapter, if not the one that its files name.")
    ] = None,
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Merge the adapter of a model that sees. The folder `language` of the result is a plain model for any tool.

    [bold]reparam vision merge merged --from out/sees[/bold]
    """
    from reparam.vision.merging import merge_to

    merge_to(output, run, base=base, dtype=dtype, overwrite=overwrite, console=console)


def _run(stage: Stage, config: Path | None, overrides: Mapping[str, Any], *, dry_run: bool, json: bool) -> None:
    resolved = resolve_stage(stage, config, overrides)
    check_inputs(resolved.train)
    words = Console(quiet=True) if json else console
    if not dry_run:
        base, rows = resolved.train.base.path, ", ".join(resolved.train.data.sources())
        say(words, f"training {base} to see with {rows}; results go to {resolved.train.run.output}")
    from reparam.vision.run import rehearse, train
    from reparam.vision.show import ShowVision, ShowVisionJson

    show = ShowVisionJson(console) if json else ShowVision(console)
    if dry_run:
        rehearse(resolved, show=show)
        return
    result = train(resolved, show=show)
    if result.signal is not None:
        if json:
            say_line(console, {"event": "stopped", "signal": result.signal, "folder": str(result.folder)})
        say(words, f"stopped by a signal; run the same command to continue from the checkpoint in {result.folder}")
        raise typer.Exit(128 + result.signal)


_KEYS = {f"vision.{field.name}": (VisionConfig, field) for field in dataclasses.fields(VisionConfig)}
vision.command("pretrain", cls=Verb)(with_options(pretrain, _KEYS))
vision.command("merge", cls=Verb)(merge)
vision.command("tune", cls=Verb)(with_options(tune))
