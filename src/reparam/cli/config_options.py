"""Command-line options made from the configuration: `--section.key`, and the names that users know as aliases."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from reparam.core.registry import METHODS
from reparam.train.config import SECTIONS, described, documentation

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


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command whose parameter `overrides` is a dictionary one option for each key of the configuration."""
    options = {key: _option(key, *described) for key, described in _keys().items()}
    names = {key.replace(".", "__"): key for key in options}

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        overrides = {names[n]: v for n, v in values.items() if n in names and v is not None}
        command(**{n: v for n, v in values.items() if n not in names}, overrides=overrides)

    own = inspect.signature(command, eval_str=True).parameters.values()
    made = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=options[key])
        for name, key in names.items()
    ]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own if p.name != "overrides"] + made
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    del wrapped.__wrapped__  # typer would read the signature underneath
    return wrapped


def _keys() -> dict[str, tuple[str, object]]:
    """Every dotted key with its description and default; a method's setting has the first method's."""
    found: dict[str, tuple[str, object]] = {}
    for section in SECTIONS:
        found |= {f"{section}.{name}": text for name, text in described(section).items()}
        if section == "adapter":
            found["method.name"] = (f"One of {', '.join(METHODS)}.", "lora")
            for method in METHODS.values():
                for field in dataclasses.fields(method):
                    text = documentation(method).get(field.name, "")
                    found.setdefault(f"method.{field.name}", (text, field.default))
    return found


def _option(key: str, text: str, default: object) -> Any:
    section = key.partition(".")[0]
    plain = default is None or default is dataclasses.MISSING or default in ("", ())
    shown = default if not isinstance(default, tuple) else ",".join(default)
    note = "" if plain else f" [dim](default: {shown})[/dim]"
    names = [f"--{key}", *ALIASES.get(key, [])]
    if isinstance(default, bool):
        option = typer.Option(f"--{key}/--no-{key}", *names[1:], help=text + note, rich_help_panel=TITLES[section])
        return Annotated[bool | None, option]
    option = typer.Option(*names, help=text + note, rich_help_panel=TITLES[section], metavar="", show_default=False)
    return Annotated[str | None, option]
