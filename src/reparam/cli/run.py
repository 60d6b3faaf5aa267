"""Verbs that run a model: generate, eval, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reparam.cli.options import AdapterFolder, Base, Dtype, Overwrite, StorageName, TaskName, console


def generate(
    prompt: Annotated[str | None, typer.Argument(help="Text to answer or continue. Without it, a chat starts.")] = None,
    base: Base = None,
    adapter: AdapterFolder = None,
    dtype: Dtype = "auto",
    storage: StorageName = None,
    compare: Annotated[bool, typer.Option(help="Show the base model's answer beside the adapter's.")] = False,
    raw: Annotated[bool, typer.Option(help="Continue the prompt as plain text, without the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer in tokens.")] = 128,
    task: TaskName = None,
) -> None:
    """Generate text with a base model and, optionally, an adapter.

    [bold]reparam generate "def scale(self, factor=2):" --adapter out/first --compare[/bold]
    """
    from reparam.recipes.chat import Chat

    chat = Chat(base, adapter, dtype=dtype, raw=raw, max_new_tokens=max_new_tokens, storage=storage, task=task)
    if prompt is not None:
        chat.answer(prompt, console, compare=compare)
    else:
        chat.loop(console, compare=compare)


def evaluate(
    data: Annotated[Path, typer.Argument(help="File of held-out rows.")],
    base: Base = None,
    adapter: AdapterFolder = None,
    dtype: Dtype = "auto",
    storage: StorageName = None,
    max_length: Annotated[int, typer.Option(min=3, help="Maximum length of a row in tokens.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 16,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a base model and an adapter on held-out rows: exact match for answers, bits per byte for texts.

    [bold]reparam eval test.jsonl --adapter out/first[/bold]
    """
    from reparam.evaluation.evaluate import evaluate as run

    found = run(data, base, adapter, dtype=dtype, max_length=max_length, batch=batch_size, storage=storage)
    found.show(console, json=json)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything that the demo writes.")] = Path(
        "out/demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the run.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Run every stage on the embedded model and data: train, compare, merge, load with plain transformers."""
    from reparam.recipes.demo import demo as run

    run(output, seed=seed, console=console, overwrite=overwrite)
