"""Verbs that run a model: train, generate, eval, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from reparam.cli.config_options import with_options
from reparam.cli.options import AdapterFolder, Base, ConfigFile, Dtype, StorageName, TaskName, app, console
from reparam.train.config import resolve


@app.command()
@with_options
def train(
    config: ConfigFile = None,
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
    from reparam.recipes.chat import Chat

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
    from reparam.evaluation.evaluate import evaluate as run

    found = run(data, base, adapter, dtype=dtype, max_length=max_length, batch=batch_size, storage=storage)
    found.show(console, json=json)


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
