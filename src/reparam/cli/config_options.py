"""Command-line options made from the configuration: `--section.key`, and the names that users know as aliases."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from reparam.cli.help import heading, row
from reparam.core.base import Storage
from reparam.core.documentation import documentation
from reparam.core.registry import METHODS, find_method
from reparam.train.config import SECTIONS, fields_of

# The names that PEFT's, TRL's and transformers' own scripts have for the same things.
ALIASES = {
    "base.path": ["--model_name_or_path", "--base", "--model"],
    "base.dtype": ["--dtype", "--torch_dtype"],
    "base.storage": ["--storage", "--quantization"],
    "base.block": ["--bnb_4bit_blocksize"],
    "base.double": ["--use_nested_quant", "--bnb_4bit_use_double_quant"],
    "data.train": ["--train_file", "--data"],
    "data.valid": ["--validation_file"],
    "data.max_length": ["--max_length", "--max_seq_length"],
    "adapter.targets": ["--target_modules", "--lora_target_modules"],
    "adapter.modules_to_save": ["--modules_to_save", "--lora_modules_to_save"],
    "method.name": ["--method", "--use_peft_method"],
    "method.r": ["--lora_r"],
    "method.alpha": ["--lora_alpha"],
    "method.dropout": ["--lora_dropout"],
    "optim.name": ["--optim"],
    "optim.learning_rate": ["--learning_rate", "--lr"],
    "optim.schedule": ["--lr_scheduler_type"],
    "optim.warmup": ["--warmup_ratio", "--warmup_steps"],
    "optim.weight_decay": ["--weight_decay"],
    "optim.max_grad_norm": ["--max_grad_norm"],
    "optim.lora_plus": ["--loraplus_lr_ratio"],
    "optim.lora_plus_embedding": ["--loraplus_lr_embedding"],
    "run.output": ["--output_dir", "--output", "-o"],
    "run.epochs": ["--num_train_epochs", "--epochs"],
    "run.max_steps": ["--max_steps"],
    "run.batch_size": ["--per_device_train_batch_size", "--batch_size"],
    "run.accumulation": ["--gradient_accumulation_steps"],
    "run.gradient_checkpointing": ["--gradient_checkpointing"],
    "run.eval_every": ["--eval_steps"],
    "run.save_every": ["--save_steps"],
    "run.keep": ["--save_total_limit"],
    "run.log_every": ["--logging_steps"],
    "run.loggers": ["--report_to"],
    "run.seed": ["--seed"],
}
TITLES = {
    "base": "The frozen model  [base]",
    "data": "What is learned  [data]",
    "adapter": "Where the method goes  [adapter]",
    "method": "The method and its settings  [method]",
    "optim": "How it is optimized  [optim]",
    "run": "How long, how large, and where results go  [run]",
}


# What `--help` shows; the others work too, and `--help-all` shows them.
USUAL = (
    "base.path",
    "base.storage",
    "data.train",
    "data.valid",
    "data.max_length",
    "adapter.targets",
    "method.name",
    "method.r",
    "method.alpha",
    "optim.learning_rate",
    "run.output",
    "run.epochs",
    "run.max_steps",
    "run.batch_size",
    "run.seed",
)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command whose parameter `overrides` is a dictionary one option for each key of the configuration.

    And `--help-all`, which shows every key, and `--help-method NAME`, which shows one method's settings.
    """
    keys = _keys()
    names = {key.replace(".", "__"): key for key in keys}

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        overrides = {names[n]: v for n, v in values.items() if n in names and v is not None}
        own = {n: v for n, v in values.items() if n not in names and n not in HELPS}
        command(**own, overrides=overrides)

    def help_all(ctx: typer.Context, asked: bool) -> None:
        if asked:
            for parameter in ctx.command.params:
                if parameter.name in names:
                    key = names[parameter.name]
                    parameter.hidden, parameter.help = False, _help(*keys[key], key)  # type: ignore[attr-defined]
            typer.echo(ctx.get_help())
            raise typer.Exit

    shown = typer.Option("--help-all", callback=help_all, is_eager=True, help="Show every option and exit.")
    method = typer.Option(
        "--help-method",
        "--help.method",
        callback=_help_method,
        is_eager=True,
        metavar="NAME",
        help="Show the settings of one method, with its defaults, and exit.",
    )
    made = {name: (None, _option(key, *keys[key])) for name, key in names.items()}
    helps = {"help_all": (False, Annotated[bool, shown]), "help_method": (None, Annotated[str | None, method])}
    own = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own if p.name != "overrides"]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (default, annotation) in (helps | made).items()
    ]
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    del wrapped.__wrapped__  # typer would read the signature underneath
    return wrapped


HELPS = ("help_all", "help_method")


def _help_method(ctx: typer.Context, name: str | None) -> None:
    """Print a method's own settings."""
    if name is None:
        return
    method = find_method(name)
    console = Console(highlight=False)
    console.print(Text(" ".join((inspect.getdoc(method) or name).split("\n\n")[0].split())))
    console.print(heading(f"Settings of {name}  [method]"))
    for field in dataclasses.fields(method):
        key = f"method.{field.name}"
        first = f"--{key} / --no-{key}" if isinstance(field.default, bool) else f"--{key}"
        for part in row(", ".join([first, *ALIASES.get(key, [])]), Text.from_markup(_help(method, field, key))):
            console.print(part)
    raise typer.Exit


def _keys() -> dict[str, tuple[type, dataclasses.Field[Any] | None]]:
    """Every dotted key with its class and field; a method's setting has the first method's."""
    found: dict[str, tuple[type, dataclasses.Field[Any] | None]] = {}
    for section, cls in SECTIONS.items():
        found |= {f"{section}.{name}": pair for name, pair in fields_of(section).items()}
        if section == "adapter":
            found["method.name"] = (cls, None)
            for method in METHODS.values():
                for field in dataclasses.fields(method):
                    found.setdefault(f"method.{field.name}", (method, field))
    return found


def _help(cls: type, field: dataclasses.Field[Any] | None, key: str) -> str:
    """What a key means, and its default, as markup."""
    if field is None:
        return f"One of {', '.join(METHODS)}. [dim](default: lora)[/dim]"
    text, default = " ".join(documentation(cls).get(field.name, "").split()), field.default
    text = f"{cls.name}: {text}" if issubclass(cls, Storage) else text
    plain = default is None or default is dataclasses.MISSING or default in ("", ())
    shown = default if not isinstance(default, tuple) else ",".join(map(str, default))
    return escape(text) + ("" if plain else f" [dim](default: {escape(str(shown))})[/dim]")


def _option(key: str, cls: type, field: dataclasses.Field[Any] | None) -> Any:
    usual = key in USUAL
    settings: dict[str, Any] = {"hidden": not usual, "rich_help_panel": TITLES[key.partition(".")[0]]}
    settings["help"] = _help(cls, field, key) if usual else ""
    names = [f"--{key}", *ALIASES.get(key, [])]
    if field is not None and isinstance(field.default, bool):
        return Annotated[bool | None, typer.Option(f"--{key}/--no-{key}", *names[1:], **settings)]
    return Annotated[str | None, typer.Option(*names, metavar="", show_default=False, **settings)]
