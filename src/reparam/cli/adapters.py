"""Verbs on finished adapters: merge, compose, compress, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reparam.cli.options import Base, Dtype, TaskName, console


def merge(
    output: Annotated[Path, typer.Argument(help="New folder for the merged model.")],
    adapter: Annotated[str, typer.Option("--adapter", "-a", help="Folder of the adapter.")],
    base: Base = None,
    dtype: Dtype = "auto",
    onto: Annotated[
        str, typer.Option(help="trained: the base as it was trained on, dequantized; original: the files' own weights.")
    ] = "trained",
    into: Annotated[
        str | None, typer.Option(help="nf4 or int8: write the storage of the base again, and lose part of the update.")
    ] = None,
    rounding: Annotated[str, typer.Option(help="With --into: aware of the update, or nearest.")] = "aware",
    force: Annotated[bool, typer.Option(help="Merge even if less than 90 % of the update survives rounding.")] = False,
    task: TaskName = None,
) -> None:
    """Fold an adapter into its base and write a plain model that stock tools load.

    [bold]reparam merge merged --adapter out/first[/bold]
    """
    from reparam.recipes.merge import merge_to

    merge_to(
        output,
        base,
        adapter,
        dtype=dtype,
        onto=onto,
        into=into,
        rounding=rounding,
        force=force,
        task=task,
        console=console,
    )


def compose(
    adapters: Annotated[list[str], typer.Argument(help="Folders of adapters on one base, ours, PEFT's or of runs.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the adapter that is their sum.")],
    weights: Annotated[str | None, typer.Option(help="A number for each: 0.5,0.3,0.2; by default the mean.")] = None,
    space: Annotated[
        str, typer.Option(help="delta: the sum of the changes; factor: LoraHub's, of the factors apart; ties; dare.")
    ] = "delta",
    rank: Annotated[int | None, typer.Option(help="Highest rank of the result; by default what loses nothing.")] = None,
    density: Annotated[float, typer.Option(help="ties and dare: the share of entries that stay.")] = 0.2,
    seed: Annotated[int, typer.Option(help="dare: what stays; cma: what is drawn.")] = 0,
    base: Annotated[
        str | None, typer.Option("--base", "-b", help="Their base: for --search, DoRA's gain, and biases.")
    ] = None,
    dtype: Dtype = "auto",
    format: Annotated[str, typer.Option(help="reparam, or peft.")] = "reparam",
    search: Annotated[
        Path | None, typer.Option(help="LoraHub: JSONL file of a few rows; weights are searched for on them.")
    ] = None,
    valid: Annotated[Path | None, typer.Option(help="With --search: held-out rows to compare on.")] = None,
    budget: Annotated[int, typer.Option(help="With --search: how many candidates are tried.")] = 40,
    optimizer: Annotated[
        str, typer.Option(help="With --search: cobyla, the better one for few candidates; cma, for fewer forwards.")
    ] = "cobyla",
    bound: Annotated[float, typer.Option(help="With --search: weights are from -bound to bound.")] = 1.5,
    l1: Annotated[float, typer.Option(help="With --search: penalty on the weights' sizes.")] = 0.05,
    l1_reduction: Annotated[str, typer.Option(help="With --search: mean of the sizes, or sum.")] = "mean",
    max_length: Annotated[int, typer.Option(min=3, help="With --search: longest row in tokens.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="With --search: rows in one forward.")] = 64,
) -> None:
    """Add adapters up, with weights, into one ordinary adapter, and say what that lost.

    [bold]reparam compose out/a out/b out/c --weights 0.5,0.3,0.2 --output out/mix[/bold]

    With --search the weights come from a few examples of a new task, without gradients (LoraHub).

    [bold]reparam compose out/a out/b out/c --search few.jsonl --output out/hub[/bold]
    """
    if search is not None:
        if weights is not None:
            raise ValueError("--weights and --search exclude each other: the search finds the weights")
        from reparam.recipes.lorahub import search_to

        search_to(
            output,
            adapters,
            search,
            valid=valid,
            space=space,
            rank=rank,
            budget=budget,
            optimizer=optimizer,
            seed=seed,
            bound=bound,
            l1=l1,
            l1_reduction=l1_reduction,
            max_length=max_length,
            batch=batch_size,
            base=base,
            dtype=dtype,
            format=format,
            console=console,
        )
        return
    if valid is not None:
        raise ValueError("--valid is for --search, which compares on it")
    from reparam.recipes.compose import compose_to

    compose_to(
        output,
        adapters,
        weights,
        space=space,
        rank=rank,
        density=density,
        seed=seed,
        base=base,
        dtype=dtype,
        format=format,
        console=console,
    )


def compress(
    adapter: Annotated[str, typer.Argument(help="Folder of an adapter, ours, PEFT's or of a run.")],
    output: Annotated[Path, typer.Argument(help="New folder for the smaller adapter.")],
    energy: Annotated[
        float | None, typer.Option(help="Share of |ΔW|² that each site keeps, with as few components as do.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Highest rank of a site.")] = None,
    bytes: Annotated[
        int | None, typer.Option("--bytes", help="Size of all tensors; what holds most for its bytes stays.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="JSONL file of held-out rows: scores before and after.")] = None,
    base: Annotated[str | None, typer.Option("--base", "-b", help="With --data: its base, if not as it says.")] = None,
    dtype: Dtype = "auto",
    max_length: Annotated[int, typer.Option(min=3, help="With --data: longest row in tokens.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="With --data: rows in one forward.")] = 16,
    format: Annotated[str, typer.Option(help="reparam, or peft.")] = "reparam",
) -> None:
    """Make a finished adapter smaller without its data: fewer components, the rest as near as can be.

    [bold]reparam compress out/first out/small --energy 0.99[/bold]
    """
    from reparam.recipes.compress import compress_to

    if base is not None and data is None:
        raise ValueError("--base is for --data, which runs it; ranks are chosen without the base")
    compress_to(
        output,
        adapter,
        energy=energy,
        rank=rank,
        bytes=bytes,
        data=data,
        base=base,
        dtype=dtype,
        max_length=max_length,
        batch=batch_size,
        format=format,
        console=console,
    )


def inspect(
    folder: Annotated[Path, typer.Argument(help="Folder of an adapter, ours or PEFT's, or of a model.")],
    base: Annotated[str | None, typer.Option("--base", "-b", help="Its base, to compare |ΔW| with |W|.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Folder for PNGs of what is shown.")] = None,
    probe: Annotated[Path | None, typer.Option(help="Of a mixture: JSONL file of rows to see its routers on.")] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Singular values of ΔW; with --base, what it amplifies.")
    ] = False,
    survival: Annotated[
        bool, typer.Option("--survival", help="With --base: what of ΔW merges into 16, 8 and 4 bits would keep.")
    ] = False,
    against: Annotated[
        Path | None, typer.Option(help="Folder of another adapter: which directions they have in common.")
    ] = None,
    suggest: Annotated[
        float | None, typer.Option(help="What could be dropped and shrunk, keeping this share of |ΔW|²: 0.99.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="With --suggest: JSONL file of held-out rows to score on.")] = None,
) -> None:
    """Show what an adapter holds: method, sites, ranks, the size of the change, bytes. Of a model: what is quantized.

    [bold]reparam inspect out/first[/bold]

    [bold]reparam inspect out/first --deep --suggest 0.99[/bold]
    """
    from reparam.inspect.details import Closely
    from reparam.inspect.show import show

    asked = Closely(deep=deep, survival=survival, against=against, suggest=suggest, data=data)
    show(folder, base, console, json=json, plot=plot, probe=probe, asked=asked)
