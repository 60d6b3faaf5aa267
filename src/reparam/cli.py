"""The command line: verbs, their options and exit codes. What they do is elsewhere.

Exit codes: 0 done, 2 usage or configuration, 1 failure at run time, 130 and 143 after SIGINT and SIGTERM.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from reparam.train.config import resolve
from reparam.train.options import with_options

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Adapt large models by reparameterising their weights: train a small piece, prove it, fold it back.\n\n"
    "Start with [bold]reparam demo[/bold], then [bold]reparam train --base.path MODEL --data.train rows.jsonl[/bold].",
)
console = Console()
UsageProblem: Any = typer.BadParameter.__mro__[2]  # click's ClickException; newer typer has a click of its own
Base = Annotated[str | None, typer.Option("--base", "-b", help="Base model: a folder or a hub id.")]
AdapterFolder = Annotated[
    str | None, typer.Option("--adapter", "-a", help="Folder of an adapter, ours or PEFT's, or of a training run.")
]
TaskName = Annotated[str | None, typer.Option(help="The task, for an adapter whose gates go by it.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
StorageName = Annotated[
    str | None,
    typer.Option("--storage", help="How the base is kept: dense, nf4 or int8; by default as the adapter was trained."),
]


@app.command()
@with_options
def train(
    config: Annotated[Path | None, typer.Option("--config", "-c", help="TOML file; options come on top.")] = None,
    overrides: Any = None,
) -> None:
    """Train an adapter on JSONL rows, prove that it works, and print held-out scores before and after.

    Rows are {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}, one JSON object per line.
    Loss is on the answers only. A second call with the same output folder continues from its newest checkpoint.

    [bold]reparam train --base.path ./model --data.train rows.jsonl --method.r 16 --run.output out/first[/bold]
    """
    from reparam.train.run import train as run
    from reparam.train.show import Show

    result = run(resolve(config, overrides), show=Show(console))
    if result.signal is not None:
        console.print(f"stopped by a signal; the same command continues from the checkpoint in {result.folder}")
        raise typer.Exit(128 + result.signal)


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to answer or continue; without it, a chat starts.")] = None,
    base: Base = None,
    adapter: AdapterFolder = None,
    dtype: Dtype = "auto",
    storage: StorageName = None,
    compare: Annotated[bool, typer.Option(help="Show the base model's answer beside the adapter's.")] = False,
    raw: Annotated[bool, typer.Option(help="Continue the prompt as plain text, without the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 128,
    task: TaskName = None,
) -> None:
    """Chat with, or complete by, a base model with an adapter on it.

    [bold]reparam generate "def scale(self, factor=2):" --adapter out/first --compare[/bold]
    """
    from reparam.serve.chat import Chat

    chat = Chat(base, adapter, dtype=dtype, raw=raw, max_new_tokens=max_new_tokens, storage=storage, task=task)
    if prompt is not None:
        chat.answer(prompt, console, compare=compare)
    else:
        chat.loop(console, compare=compare)


@app.command("eval")
def evaluate(
    data: Annotated[Path, typer.Argument(help="JSONL file of held-out rows.")],
    base: Base = None,
    adapter: AdapterFolder = None,
    dtype: Dtype = "auto",
    storage: StorageName = None,
    max_length: Annotated[int, typer.Option(min=3, help="Longest row in tokens.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in one forward.")] = 16,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a base model and an adapter on held-out rows: exact match of answers, bits per byte of texts.

    [bold]reparam eval test.jsonl --adapter out/first[/bold]
    """
    from reparam.train.evaluate import evaluate as run

    found = run(data, base, adapter, dtype=dtype, max_length=max_length, batch=batch_size, storage=storage)
    found.show(console, json=json)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Model to pack: a folder or a hub id.")],
    output: Annotated[Path, typer.Argument(help="New folder for the packed model.")],
    storage: Annotated[str, typer.Option(help="nf4 or int8.")] = "nf4",
    block: Annotated[int, typer.Option(help="NF4: entries that share one magnitude.")] = 64,
    double: Annotated[bool, typer.Option(help="NF4: keep the magnitudes in 8 bits too.")] = True,
    targets: Annotated[str, typer.Option(help="What is packed, as adapter.targets in train.")] = "all-linear",
    dtype: Dtype = "auto",
    format: Annotated[str, typer.Option(help="reparam, or bitsandbytes for stock tools (NF4 only).")] = "reparam",
) -> None:
    """Pack the frozen matrices of a model and write it, so that it loads in a quarter of the memory.

    [bold]reparam quantize ./model ./model-nf4[/bold]
    """
    from reparam.recipes.quantize import quantize_to

    settings = {"path": model, "dtype": dtype, "storage": storage, "block": block, "double": double, "packed": targets}
    config = resolve(None, {f"base.{key}": value for key, value in settings.items()})
    quantize_to(output, config.base, format=format, console=console)


@app.command()
def merge(
    output: Annotated[Path, typer.Argument(help="New folder for the merged model.")],
    adapter: Annotated[str, typer.Option("--adapter", "-a", help="Folder of the adapter.")],
    base: Base = None,
    dtype: Dtype = "auto",
    onto: Annotated[
        str, typer.Option(help="trained: the base as it was trained on, unpacked; original: the files' own weights.")
    ] = "trained",
    into: Annotated[
        str | None, typer.Option(help="nf4 or int8: write the storage of the base again, and lose part of the update.")
    ] = None,
    rounding: Annotated[str, typer.Option(help="With --into: aware of the update, or nearest.")] = "aware",
    force: Annotated[bool, typer.Option(help="Write it however little of the update survives.")] = False,
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


@app.command()
def compose(
    adapters: Annotated[list[str], typer.Argument(help="Folders of adapters on one base, ours, PEFT's or of runs.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the adapter that is their sum.")],
    weights: Annotated[str | None, typer.Option(help="A number for each: 0.5,0.3,0.2; by default the mean.")] = None,
    space: Annotated[
        str, typer.Option(help="delta: the sum of the changes; factor: LoraHub's, of the factors apart; ties; dare.")
    ] = "delta",
    rank: Annotated[int | None, typer.Option(help="Highest rank of the result; by default what loses nothing.")] = None,
    density: Annotated[float, typer.Option(help="ties and dare: the share of entries that stay.")] = 0.2,
    seed: Annotated[int, typer.Option(help="dare: what stays.")] = 0,
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


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="Folder of an adapter, ours or PEFT's, or of a model.")],
    base: Annotated[str | None, typer.Option("--base", "-b", help="Its base, to compare |ΔW| with |W|.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Folder for PNGs: ranks; with --base, directions too.")] = None,
    probe: Annotated[Path | None, typer.Option(help="Of a mixture: JSONL file of rows to see its routers on.")] = None,
) -> None:
    """Show what an adapter holds: method, sites, ranks, the size of the change, bytes. Of a model: what is packed.

    [bold]reparam inspect out/first[/bold]
    """
    from reparam.inspect.show import show

    show(folder, base, console, json=json, plot=plot, probe=probe)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything the demo makes.")] = Path(
        "out/demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the run.")] = 0,
) -> None:
    """The whole way on the embedded model and data: train, compare, merge, load with plain transformers."""
    from reparam.recipes.demo import demo as run

    run(output, seed=seed, console=console)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show warnings as one line, without a source line under them."""
    shown = warnings.showwarning
    warnings.showwarning = lambda message, *rest, **more: print(f"warning: {message}", file=sys.stderr)
    try:
        yield
    finally:
        warnings.showwarning = shown


def main() -> None:
    """Run the command line, with one sentence and an exit code for every failure."""
    errors = Console(stderr=True)
    try:
        with _plain_warnings():
            code = app(standalone_mode=False)
    except UsageProblem as error:
        error.show()
        code = error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        errors.print("interrupted")
        code = 130
    except (OSError, RuntimeError, FloatingPointError) as error:
        errors.print(f"[bold red]failed:[/bold red] {_escaped(error)}", highlight=False, soft_wrap=True)
        code = 1
    except ValueError as error:
        errors.print(f"[bold red]error:[/bold red] {_escaped(error)}", highlight=False, soft_wrap=True)
        code = 2
    raise SystemExit(code if isinstance(code, int) else 0)


def _escaped(error: BaseException) -> str:
    return str(error).replace("[", r"\[")
