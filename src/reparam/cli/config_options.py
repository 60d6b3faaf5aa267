"""Make command-line options from the configuration: `--section.key`, and the names that other libraries use."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

import reparam.methods
import reparam.weights  # noqa: F401  (both fill their registries)
from reparam.cli.help import heading, row
from reparam.core.base import Storage
from reparam.core.documentation import documentation
from reparam.core.registry import METHODS, STORAGES, find_method
from reparam.errors import ConfigError
from reparam.train.base import KEYS
from reparam.train.config import SECTIONS, fields_of
from reparam.train.switches import SWITCHES, switched

Key = tuple[type, dataclasses.Field[Any] | None]

# Names of the same settings in the scripts of PEFT, TRL and transformers.
ALIASES = {
    "base.path": ["--model_name_or_path", "--base", "--model", "--base_model", "--model_name"],
    "base.dtype": ["--dtype", "--torch_dtype"],
    "base.revision": ["--model_revision", "--revision_of_model"],
    "base.storage": ["--storage", "--quantization"],
    "base.block": ["--bnb_4bit_blocksize"],
    "base.double": [
        "--use_nested_quant",
        "--use_bnb_nested_quant",
        "--double_quantization",
        "--bnb_4bit_use_double_quant",
    ],
    "data.train": ["--train_file", "--data", "--dataset", "--dataset_name"],
    "data.valid": ["--validation_file"],
    "data.chat_template": ["--chat_template", "--chat_template_path"],
    "data.system": ["--default_system"],
    "data.thinking": ["--enable_thinking"],
    "data.holdout": ["--val_size", "--val_set_size"],
    "data.weights": ["--interleave_probs"],
    "data.max_rows": ["--max_samples"],
    "data.max_length": ["--max_length", "--max_seq_length", "--cutoff_len", "--sequence_len"],
    "data.packing": ["--packing"],
    "data.streaming": ["--streaming", "--dataset_streaming"],
    "data.buffer": ["--buffer_size", "--shuffle_buffer_size"],
    "adapter.targets": ["--target_modules", "--lora_target_modules", "--lora_target"],
    "adapter.modules_to_save": ["--modules_to_save", "--lora_modules_to_save", "--additional_target"],
    "adapter.start": ["--adapter_name_or_path", "--lora_model_dir"],
    "adapter.tie": ["--ensure_weight_tying", "--lora_ensure_weight_tying"],
    "method.name": ["--method", "--use_peft_method"],
    "method.r": ["--lora_r", "--lora_rank", "--r"],
    "method.alpha": ["--lora_alpha"],
    "method.dropout": ["--lora_dropout"],
    "optim.name": ["--optim", "--optimizer"],
    "optim.learning_rate": ["--learning_rate", "--lr"],
    "optim.schedule": ["--lr_scheduler_type", "--lr_scheduler"],
    "optim.warmup": ["--warmup_ratio", "--warmup_steps"],
    "optim.weight_decay": ["--weight_decay"],
    "optim.max_grad_norm": ["--max_grad_norm"],
    "optim.neftune": ["--neftune_noise_alpha"],
    "optim.label_smoothing": ["--label_smoothing_factor"],
    "optim.lora_plus": ["--loraplus_lr_ratio"],
    "optim.lora_plus_embedding": ["--loraplus_lr_embedding"],
    "optim.beta": ["--beta"],
    "prefer.loss_type": ["--loss_type"],
    "prefer.desirable_weight": ["--desirable_weight"],
    "prefer.undesirable_weight": ["--undesirable_weight"],
    "prefer.reward": ["--reward"],
    "prefer.samples": ["--num_generations"],
    "prefer.new_tokens": ["--max_completion_length"],
    "run.task": ["--task", "--task_type"],
    "run.objective": ["--objective"],
    "run.output": ["--output_dir", "--output", "-o"],
    "run.epochs": ["--num_train_epochs", "--epochs", "--num_epochs"],
    "run.max_steps": ["--max_steps"],
    "run.batch_size": ["--per_device_train_batch_size", "--micro_batch_size", "--batch_size"],
    "run.accumulation": ["--gradient_accumulation_steps"],
    "run.gradient_checkpointing": ["--gradient_checkpointing", "--activation_checkpointing"],
    "run.eval_every": ["--eval_steps"],
    "run.group_by_length": ["--group_by_length"],
    "run.metric": ["--metric_for_best_model"],
    "run.best": ["--load_best_model_at_end"],
    "run.patience": ["--early_stopping_patience"],
    "run.save_every": ["--save_steps"],
    "run.keep": ["--save_total_limit"],
    "run.log_every": ["--logging_steps"],
    "run.loggers": ["--report_to"],
    "run.name": ["--run_name"],
    "run.fresh": ["--fresh", "--overwrite_output_dir"],
    "run.seed": ["--seed", "--random_state"],
}
TITLES = {
    "base": "Frozen base model  [base]",
    "data": "Data and held-out rows  [data]",
    "adapter": "Which modules are adapted  [adapter]",
    "method": "Method and its settings  [method]",
    "optim": "Optimizer  [optim]",
    "prefer": "Preference tuning  [prefer]",
    "run": "Length, batch size, output  [run]",
    "vision": "Images and how they are seen  [vision]",
}


# The options that `--help` shows. The others also work; `--help-all` shows all of them.
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
    "run.task",
    "run.objective",
    "run.output",
    "run.epochs",
    "run.max_steps",
    "run.batch_size",
    "run.seed",
)


def with_options(command: Callable[..., None], more: Mapping[str, Key] = MappingProxyType({})) -> Callable[..., None]:
    """Add one option for each key of the configuration to a command; it gets the given ones as the dict `overrides`.

    `more` are further keys, whose options `--help` shows. Also add `--help-all`, which shows every option, and
    `--help-method NAME`, which shows the settings of one method.
    """
    keys = {**_keys(), **more}

    def help_all(ctx: typer.Context, asked: bool) -> None:
        if asked:
            for parameter in ctx.command.params:
                key = (parameter.name or "").replace("__", ".", 1)
                if key in keys:
                    parameter.hidden, parameter.help = False, _help(*keys[key], key)  # type: ignore[attr-defined]
                elif parameter.name in SWITCHES:
                    parameter.hidden = False  # type: ignore[attr-defined]
            typer.echo(ctx.get_help())
            raise typer.Exit

    shown = typer.Option("--help-all", callback=help_all, is_eager=True, help="Show every option and exit.")
    method = typer.Option(
        "--help-method",
        "--help.method",
        callback=_help_method,
        is_eager=True,
        metavar="NAME",
        help="Show the settings of one method with their defaults, and exit.",
    )
    helps = {"help_all": (False, Annotated[bool, shown]), "help_method": (None, Annotated[str | None, method])}
    made = {key: _option(key, *pair, panel=TITLES["vision"] if key in more else None) for key, pair in keys.items()}
    return _extended(command, made, helps, _switches())


def with_storage_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Add one option for each setting of any storage to a command; it gets the given ones as the dict `overrides`.

    The options are `--<setting>` and `--base.<setting>`. If the command already has an option `--<setting>`, only the
    second name is added.
    """
    keys = {f"base.{name}": pair for name, pair in fields_of("base").items() if name not in KEYS}
    taken = inspect.signature(command).parameters
    short = {key: [f"--{name}"] for key in keys if (name := key.removeprefix("base.")) not in taken}
    panel = "Settings of the storage  [base]"
    options = {key: _option(key, *pair, short=short.get(key, []), panel=panel) for key, pair in keys.items()}
    return _extended(command, options, {}, {})


def _extended(
    command: Callable[..., None],
    options: dict[str, Any],
    more: dict[str, tuple[Any, Any]],
    switches: dict[str, Any],
) -> Callable[..., None]:
    """Add `options`, by dotted key, `switches`, by name, and `more` parameters to a command.

    It gets the settings of options and switches as `overrides`, by dotted key.
    """
    names = {key.replace(".", "__", 1): key for key in options}

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        given = {name: value for name, value in values.items() if value is not None}
        overrides = {names[n]: v for n, v in given.items() if n in names}
        meant = {n: v for n, v in given.items() if n in switches}
        own = {n: v for n, v in values.items() if n not in names and n not in more and n not in switches}
        command(**own, overrides=_together(overrides, meant))

    made = {name: (None, options[key]) for name, key in names.items()}
    made |= {name: (None, annotation) for name, annotation in switches.items()}
    own = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own if p.name != "overrides"]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (default, annotation) in (more | made).items()
    ]
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    del wrapped.__wrapped__  # otherwise typer would read the signature of the wrapped command
    return wrapped


def _together(given: dict[str, Any], switches: dict[str, Any]) -> dict[str, Any]:
    """The given settings and those that switches stand for. Raises ConfigError if they contradict each other."""
    meant = switched(switches)
    wrong = [
        f"--{name} sets {key} to {value}, and another option sets it to {given[key]}; leave one of them out"
        for name in switches
        for key, value in switched({name: switches[name]}).items()
        if str(given.get(key, value)) != str(value)
    ]
    if wrong:
        raise ConfigError("; ".join(wrong))
    return {**meant, **given}


def _switches() -> dict[str, Any]:
    """Annotations of the options for `SWITCHES`."""
    return {
        name: Annotated[
            str | None,
            typer.Option(
                f"--{name}",
                metavar="",
                hidden=True,
                show_default=False,
                rich_help_panel="Options of other libraries",
                help="; ".join(f"{value}: {_settings(settings)}" for value, settings in choices.items()),
            ),
        ]
        for name, choices in SWITCHES.items()
    }


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items()) or "the default"


def _help_method(ctx: typer.Context, name: str | None) -> None:
    """Print the description and the settings of a method, then exit."""
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


def _keys() -> dict[str, Key]:
    """All dotted keys, each with its class and field; a setting of several methods has those of the first method."""
    found: dict[str, Key] = {}
    for section, cls in SECTIONS.items():
        found |= {f"{section}.{name}": pair for name, pair in fields_of(section).items()}
        if section == "adapter":
            found["method.name"] = (cls, None)
            for method in METHODS.values():
                for field in dataclasses.fields(method):
                    found.setdefault(f"method.{field.name}", (method, field))
    return found


def _help(cls: type, field: dataclasses.Field[Any] | None, key: str) -> str:
    """Help text of a key with its default, as rich markup."""
    if field is None:
        return f"One of {', '.join(METHODS)}. [dim](default: lora)[/dim]"
    text, default = " ".join(documentation(cls).get(field.name, "").split()), field.default
    if key == "base.storage":
        text += f" One of {', '.join(STORAGES)}."
    text = f"{cls.name}: {text}" if issubclass(cls, Storage) else text
    plain = default is None or default is dataclasses.MISSING or default in ("", ())
    shown = default if not isinstance(default, tuple) else ",".join(map(str, default))
    return escape(text) + ("" if plain else f" [dim](default: {escape(str(shown))})[/dim]")


def _option(
    key: str, cls: type, field: dataclasses.Field[Any] | None, *, short: Sequence[str] = (), panel: str | None = None
) -> Any:
    """Annotation of the option for a key. Without a given panel, an option that is not in `USUAL` is hidden."""
    shown = panel is not None or key in USUAL
    settings: dict[str, Any] = {"hidden": not shown, "rich_help_panel": panel or TITLES[key.partition(".")[0]]}
    settings["help"] = _help(cls, field, key) if shown else ""
    names, aliases = [*short, f"--{key}"], ALIASES.get(key, [])
    if field is not None and isinstance(field.default, bool):
        flags = [f"{name}/--no-{name.removeprefix('--')}" for name in names]
        return Annotated[bool | None, typer.Option(*flags, *aliases, **settings)]
    return Annotated[str | None, typer.Option(*names, *aliases, metavar="", show_default=False, **settings)]
