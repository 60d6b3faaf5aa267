"""Verbs on models: quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import reparam.weights  # noqa: F401  (fills its registry)
from reparam.cli.config_options import with_storage_settings
from reparam.cli.options import Dtype, Overwrite, console
from reparam.core.registry import STORAGES


@with_storage_settings
def quantize(
    model: Annotated[str, typer.Argument(help="Model to quantize: a folder or a hub id.")],
    output: Annotated[Path, typer.Argument(help="New folder for the quantized model.")],
    storage: Annotated[
        str, typer.Option(help=f"Storage of the matrices: {', '.join(name for name in STORAGES if name != 'dense')}.")
    ] = "nf4",
    targets: Annotated[
        str, typer.Option(help="Which matrices are quantized, written like --adapter.targets of train.")
    ] = "all-linear",
    dtype: Dtype = "auto",
    format: Annotated[
        str, typer.Option(help="reparam, or bitsandbytes, which stock transformers can load (nf4 only).")
    ] = "reparam",
    overwrite: Overwrite = False,
    overrides: Any = None,
) -> None:
    """Quantize the frozen matrices of a model and write it, so that it loads in a quarter of the memory.

    [bold]reparam quantize ./model ./model-nf4[/bold]
    """
    from reparam.recipes.quantize import quantize_to
    from reparam.train.config import resolve

    own = {"path": model, "dtype": dtype, "storage": storage, "quantized": targets}
    config = resolve(None, {**{f"base.{key}": value for key, value in own.items()}, **overrides})
    quantize_to(output, config.base, format=format, console=console, overwrite=overwrite)
