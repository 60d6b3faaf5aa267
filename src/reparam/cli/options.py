"""The application, its console, and the options that several verbs have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Adapt large models by reparameterizing their weights: train a small piece, prove it, fold it back.\n\n"
    "Start with [bold]reparam demo[/bold], then [bold]reparam train --base.path MODEL --data.train rows.jsonl[/bold].",
)
console = Console()
Base = Annotated[str | None, typer.Option("--base", "-b", help="Base model: a folder or a hub id.")]
AdapterFolder = Annotated[
    str | None, typer.Option("--adapter", "-a", help="Folder of an adapter, ours or PEFT's, or of a training run.")
]
TaskName = Annotated[str | None, typer.Option(help="The task, for an adapter whose gates go by it.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="TOML file; options come on top.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
StorageName = Annotated[
    str | None,
    typer.Option("--storage", help="How the base is kept: dense, nf4 or int8; by default as the adapter was trained."),
]
