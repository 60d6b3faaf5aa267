"""The application, its console, and the options that several verbs share. A verb is imported when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command as as_command

from reparam.cli.help import Verb, described, heading, row, write
from reparam.cli.screen import console as console

# In the order of `--help`: the module and function of each verb, and its line in `--help`.
VERBS = {
    "train": ("train.train", "Train an adapter and score it."),
    "plan": ("plan.plan", "Show what a training run will hold in memory, and what fits."),
    "data": ("data.data", "Show what training would make of a file of rows."),
    "generate": ("run.generate", "Generate text with a base model and, optionally, an adapter."),
    "eval": ("run.evaluate", "Score a base model and an adapter on held-out rows."),
    "serve": ("serve.serve", "Serve a base and many adapters over HTTP, in one batch."),
    "lm_eval": ("harness.lm_eval", "Score them on the public tasks of EleutherAI's harness."),
    "demo": ("run.demo", "Train, compare and merge on the embedded model and data."),
    "merge": ("adapters.merge", "Merge an adapter into its base and write a plain model."),
    "export": ("export.export", "Write an adapter for vLLM, llama.cpp or mlx-lm."),
    "compose": ("adapters.compose", "Combine adapters into one, as a weighted sum."),
    "compress": ("adapters.compress", "Make a finished adapter smaller without its data."),
    "inspect": ("adapters.inspect", "Show what an adapter or a quantized model holds."),
    "vision": ("vision.vision", "Teach a language model to see, merge it, and tune it."),
    "compare": ("compare.compare", "Compare methods on your own task and report which is best."),
    "quantize": ("models.quantize", "Quantize a model so that it loads in a quarter of the memory."),
    "intrinsic": ("study.intrinsic", "Measure how many dimensions a task needs."),
}


class _Loaded(MutableMapping[str, Any]):
    """A mapping from names to commands, which imports a command when it is first accessed."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            file, _, function = VERBS[name][0].partition(".")
            verb = getattr(importlib.import_module(f"reparam.cli.{file}"), function)
            if isinstance(verb, typer.Typer):  # a group of verbs
                self._made[name] = as_command(verb)
                self._made[name].name = name
                return self._made[name]
            one = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
            one.command(name, cls=Verb, context_settings=getattr(verb, "context_settings", None))(verb)
            self._made[name] = as_command(one)
        return self._made[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._made[name] = command

    def __delitem__(self, name: str) -> None:
        del self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(VERBS)

    def __len__(self) -> int:
        return len(VERBS)


class Verbs(TyperGroup):
    """The group of all verbs; help and completion show names and one line each, without importing the verbs."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _Loaded()

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the verbs in the order of the help."""
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a verb without its options, for help and completion; `resolve_command` returns the full verb."""
        return TyperCommand(cmd_name, help=VERBS[cmd_name][1]) if cmd_name in VERBS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Import and return the verb that is called."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, self.commands[name] if name in VERBS else command, rest

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the description of the program, its verbs and its options."""
        parts = [*described(self, ctx), heading("Verbs")]
        parts += [Text.assemble("  ", (f"{name:<11}", "bold cyan"), line) for name, (_, line) in VERBS.items()]
        parts.append(heading("Options"))
        for parameter in self.get_params(ctx):
            names, text = parameter.get_help_record(ctx) or ("", "")
            parts += row(names, Text(text)) if names else []
        write(formatter, parts)


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Adapt large models by reparameterizing their weights: train a small adapter, check it, merge it.\n\n"
    "Start with [bold]reparam demo[/bold], then [bold]reparam train --base.path MODEL --data.train rows.jsonl[/bold].",
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"reparam {sys.modules['reparam'].__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


Base = Annotated[str | None, typer.Option("--base", "-b", help="Base model: a folder or a hub id.")]
AdapterFolder = Annotated[
    str | None, typer.Option("--adapter", "-a", help="Folder of an adapter (reparam's or PEFT's) or of a training run.")
]
TaskName = Annotated[str | None, typer.Option(help="Task name, for an adapter with gates by task.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="TOML or YAML file; options override it.")]
Dtype = Annotated[str, typer.Option(help="Dtype of the base: auto (as in its files), float32, bfloat16 or float16.")]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite_output_dir",
        "--overwrite-output-dir",
        help="Replace what an earlier call wrote to the output folder. By default, a folder that is not empty is "
        "refused.",
    ),
]
StorageName = Annotated[
    str | None,
    typer.Option(
        "--storage", help="Storage of the base, such as dense. By default, the one that the adapter was trained on."
    ),
]
