"""Verbs on finished adapters: merge, compose, compress, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from reparam.cli.options import Base, Dtype, Overwrite, TaskName, console


def merge(
    output: Annotated[Path, typer.Argument(help="New folder for the merged model.")],
    adapter: Annotated[str, typer.Option("--adapter", "-a", help="Folder of the adapter.")],
    base: Base = None,
    dtype: Dtype = "auto",
    onto: Annotated[
        str,
        typer.Option(
            help="Weights to merge into. trained: those that the adapter was trained on, dequantized if they were "
            "quantized; original: those in the base's files."
        ),
    ] = "trained",
    into: Annotated[
        str | None,
        typer.Option(
            help="Quantize the merged weights again: the name of the storage that the adapter was trained on. "
            "Rounding loses part of the update."
        ),
    ] = None,
    rounding: Annotated[
        str,
        typer.Option(
            help="With --into: aware chooses codes that keep more of the update; nearest chooses the nearest ones."
        ),
    ] = "aware",
    force: Annotated[bool, typer.Option(help="Merge even if less than 90 % of the update survives rounding.")] = False,
    task: TaskName = None,
    overwrite: Overwrite = False,
) -> None:
    """Merge an adapter into its base and write a plain model that stock tools load.

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
        overwrite=overwrite,
        console=console,
    )


def compose(
    adapters: Annotated[
        list[str], typer.Argument(help="Folders of adapters of one base: reparam's, PEFT's, or of training runs.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the combined adapter.")],
    weights: Annotated[
        str | None, typer.Option(help="One number per adapter: 0.5,0.3,0.2. By default all are equal and sum to 1.")
    ] = None,
    space: Annotated[
        str,
        typer.Option(
            help="How adapters are combined. delta: add the weight changes; factor: add the A and the B factors "
            "separately, as LoraHub does; ties and dare: the methods of these names."
        ),
    ] = "delta",
    rank: Annotated[
        int | None, typer.Option(help="Largest rank of the result. By default, the smallest that is exact.")
    ] = None,
    density: Annotated[
        float, typer.Option(help="With --space ties or dare: share of the entries that are kept.")
    ] = 0.2,
    seed: Annotated[
        int, typer.Option(help="Seed of the entries that dare keeps and of the candidates that cma draws.")
    ] = 0,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", "-b", help="Base of the adapters, which --search, DoRA's gain, and trained biases need."
        ),
    ] = None,
    dtype: Dtype = "auto",
    format: Annotated[str, typer.Option(help="Format of the adapter that is written: reparam or peft.")] = "reparam",
    search: Annotated[
        Path | None, typer.Option(help="File of a few rows. LoraHub searches for the weights that fit them best.")
    ] = None,
    valid: Annotated[
        Path | None, typer.Option(help="With --search: File of held-out rows to score the result on.")
    ] = None,
    budget: Annotated[int, typer.Option(help="With --search: number of candidates to try.")] = 40,
    optimizer: Annotated[
        str,
        typer.Option(
            help="With --search: cobyla gives better results with few candidates; cma needs fewer forward passes."
        ),
    ] = "cobyla",
    bound: Annotated[float, typer.Option(help="With --search: weights lie between -bound and bound.")] = 1.5,
    l1: Annotated[float, typer.Option(help="With --search: coefficient of the L1 penalty on the weights.")] = 0.05,
    l1_reduction: Annotated[
        str, typer.Option(help="With --search: whether the L1 penalty is the mean or the sum of the absolute weights.")
    ] = "mean",
    max_length: Annotated[int, typer.Option(min=3, help="With --search: maximum length of a row in tokens.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="With --search: rows per forward pass.")] = 64,
    overwrite: Overwrite = False,
) -> None:
    """Combine adapters into one ordinary adapter, as a weighted sum, and report the approximation error.

    [bold]reparam compose out/a out/b out/c --weights 0.5,0.3,0.2 --output out/mix[/bold]

    With --search, LoraHub finds the weights from a few examples of a new task, without gradients.

    [bold]reparam compose out/a out/b out/c --search few.jsonl --output out/hub[/bold]
    """
    if search is not None:
        if weights is not None:
            raise ValueError(
                "--weights and --search cannot be used together: --search finds the weights itself; leave one out"
            )
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
            overwrite=overwrite,
            console=console,
        )
        return
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
        overwrite=overwrite,
        console=console,
    )


def compress(
    adapter: Annotated[str, typer.Argument(help="Folder of an adapter (reparam's or PEFT's) or of a training run.")],
    output: Annotated[Path, typer.Argument(help="New folder for the smaller adapter.")],
    energy: Annotated[
        float | None, typer.Option(help="Share of |ΔW|² that each site keeps, at the smallest rank that does so.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Largest rank of a site.")] = None,
    bytes: Annotated[
        int | None,
        typer.Option(
            "--bytes", help="Largest size of all tensors together; components with the most |ΔW|² per byte are kept."
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="File of held-out rows to score before and after.")] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", "-b", help="With --data: base of the adapter, if not the one that the adapter names."),
    ] = None,
    dtype: Dtype = "auto",
    max_length: Annotated[int, typer.Option(min=3, help="With --data: maximum length of a row in tokens.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="With --data: rows per forward pass.")] = 16,
    format: Annotated[str, typer.Option(help="Format of the adapter that is written: reparam or peft.")] = "reparam",
    overwrite: Overwrite = False,
) -> None:
    """Make a finished adapter smaller without its training data: reduce ranks with the least possible error.

    [bold]reparam compress out/first out/small --energy 0.99[/bold]
    """
    from reparam.recipes.compress import compress_to

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
        overwrite=overwrite,
        console=console,
    )


def inspect(
    folder: Annotated[Path, typer.Argument(help="Folder of an adapter (reparam's or PEFT's) or of a model.")],
    base: Annotated[
        str | None, typer.Option("--base", "-b", help="Base of the adapter, to compare |ΔW| with |W|.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Folder for plots of the figures, as PNG files.")] = None,
    probe: Annotated[Path | None, typer.Option(help="For a mixture: File of rows to run its routers on.")] = None,
    deep: Annotated[
        bool,
        typer.Option("--deep", help="Show singular values of ΔW and, with --base, which directions of W it amplifies."),
    ] = False,
    survival: Annotated[
        bool,
        typer.Option(
            "--survival", help="With --base: show how much of ΔW would survive a merge into 16, 8 and 4 bits."
        ),
    ] = False,
    against: Annotated[
        Path | None, typer.Option(help="Folder of another adapter; show which directions the two share.")
    ] = None,
    suggest: Annotated[
        float | None,
        typer.Option(
            help="Share of |ΔW|² to keep, such as 0.99; show which sites could be dropped or get a smaller rank."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="With --suggest: File of held-out rows to score the suggestion on.")
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image",
            help="For a model that sees: Draw the attention of its answer to --prompt over this image; repeatable.",
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="With --image: Question about the image.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Show an adapter's method, sites, ranks, size of the change, and bytes; or what is quantized in a model.

    [bold]reparam inspect out/first[/bold]

    [bold]reparam inspect out/first --deep --suggest 0.99[/bold]

    [bold]reparam inspect out/sees --image cat.png --prompt "What is this?" --plot out/plots[/bold]
    """
    from reparam.inspect.details import Closely
    from reparam.inspect.seeing import show_seeing
    from reparam.inspect.show import show
    from reparam.vision.found import vora_folder

    asked = Closely(deep=deep, survival=survival, against=against, suggest=suggest, data=data)
    how: Any = {"json": json, "plot": plot, "probe": probe, "asked": asked, "overwrite": overwrite}
    if (sees := vora_folder(folder)) is not None:
        show_seeing(sees, base, console, images=image or [], prompt=prompt, **how)
        return
    if image or prompt is not None:
        raise ValueError(f"--image and --prompt are for models that see, and {folder} holds none; leave them out")
    show(folder, base, console, **how)
