"""Verbs on models: quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reparam.cli.options import Dtype, console


def quantize(
    model: Annotated[str, typer.Argument(help="Model to quantize: a folder or a hub id.")],
    output: Annotated[Path, typer.Argument(help="New folder for the quantized model.")],
    storage: Annotated[str, typer.Option(help="nf4 or int8.")] = "nf4",
    block: Annotated[int, typer.Option(help="NF4: entries that share one magnitude.")] = 64,
    double: Annotated[bool, typer.Option(help="NF4: keep the magnitudes in 8 bits too.")] = True,
    targets: Annotated[str, typer.Option(help="What is quantized, as adapter.targets in train.")] = "all-linear",
    dtype: Dtype = "auto",
    format: Annotated[str, typer.Option(help="reparam, or bitsandbytes for stock tools (NF4 only).")] = "reparam",
) -> None:
    """Quantize the frozen matrices of a model and write it, so that it loads in a quarter of the memory.

    [bold]reparam quantize ./model ./model-nf4[/bold]
    """
    from reparam.recipes.quantize import quantize_to
    from reparam.train.config import resolve

    settings = {
        "path": model,
        "dtype": dtype,
        "storage": storage,
        "block": block,
        "double": double,
        "quantized": targets,
    }
    config = resolve(None, {f"base.{key}": value for key, value in settings.items()})
    quantize_to(output, config.base, format=format, console=console)
