"""The verb export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reparam.cli.options import Base, Dtype, Overwrite, TaskName, console


def export(
    adapter: Annotated[str, typer.Argument(help="Folder of an adapter (reparam's or PEFT's) or of a training run.")],
    output: Annotated[Path, typer.Argument(help="New folder.")],
    to: Annotated[str, typer.Option(help="The program that reads the result: vllm, gguf (llama.cpp) or mlx (mlx-lm).")],
    merged: Annotated[
        bool, typer.Option("--merged", help="Merge the adapter into its base, and write a whole model.")
    ] = False,
    rank: Annotated[
        int | None, typer.Option(help="Rank of the LoRA. By default, the smallest that keeps within --max-error.")
    ] = None,
    max_error: Annotated[
        float, typer.Option(help="Largest share of its change that a module may lose, from 0 to 1.")
    ] = 0.01,
    base: Base = None,
    dtype: Dtype = "auto",
    task: TaskName = None,
    overwrite: Overwrite = False,
) -> None:
    """Write an adapter for vLLM, llama.cpp or mlx-lm, exactly where the program can express it.

    [bold]reparam export out/first out/vllm --to vllm[/bold]

    LoRA, AdaLoRA and a task of a mixture are exact. Of DoRA and of changes of full rank, a plain LoRA keeps a part;
    the error is printed, and refused above --max-error. --merged is exact for every adapter that can be merged.
    """
    from reparam.recipes.export import export_to

    export_to(
        output,
        adapter,
        to,
        base=base,
        dtype=dtype,
        task=task,
        rank=rank,
        max_error=max_error,
        merged=merged,
        overwrite=overwrite,
        console=console,
    )
