"""The configuration of a run: frozen dataclasses, read from TOML, overridden by dotted keys, saved with the results.

Each section is a table. `[method]` holds the `name` and the settings of the method, so that a new method needs no
change in this file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import TypeAdapter, ValidationError

import reparam.methods
import reparam.weights  # noqa: F401  (these imports register methods and storages)
from reparam.core.checks import finite, nearest, whole
from reparam.core.method import Method
from reparam.core.registry import METHODS, STORAGES, find_method, find_storage, load_installed
from reparam.errors import ConfigError
from reparam.train.base import KEYS, split_keys
from reparam.train.base import BaseConfig as BaseConfig

# Names that users give to LoRA+, which is an optimization rule, not a method.
LORA_PLUS = ("lora+", "lora_plus", "loraplus", "lora++", "loraplusplus")
USUAL_RATIO = 16


def _check(settings: object, section: str, **rules: tuple[str, bool]) -> None:
    """Raise ConfigError that names every key whose rule, a pair of the expected range and a result, is not met."""
    wrong = [
        f"{section}.{key}: {getattr(settings, key)!r}: expected {text}"
        for key, (text, right) in rules.items()
        if not right
    ]
    if wrong:
        raise ConfigError("; ".join(wrong))


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The rows to train on, and the held-out rows."""

    train: str = ""
    """JSONL file of training rows. Each has messages, prompt and completion, or text."""
    valid: str | None = None
    """JSONL file of held-out rows to score. By default, a share of the training rows is held out."""
    holdout: float = 0.05
    """Share of the training rows to hold out when data.valid is not set."""
    max_length: int = 1024
    """Maximum length of a row in tokens. Longer chats are cut at the end; longer texts are split."""
    loss_on: Literal["answers", "all"] = "answers"
    """Which tokens of chats and completions count in the loss: answers, or all."""
    score_rows: int = 200
    """Number of held-out rows to answer before and after training, to count exact matches."""

    def __post_init__(self) -> None:
        idle = self.valid is not None and self.holdout == 0
        _check(
            self,
            "data",
            holdout=("a share above 0 and below 1", idle or 0 < self.holdout < 1),
            max_length=("a whole number of at least 1", whole(self.max_length, 1)),
            score_rows=("a whole number of at least 0", whole(self.score_rows, 0)),
        )


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Which modules are adapted."""

    targets: tuple[str, ...] | None = None
    """Modules to adapt, separated by commas: all-linear, attention, mlp, everything, the end of a module's path such as
    q_proj, or re: followed by a regular expression. The default depends on the method; for most it is all-linear."""
    bias: bool = False
    """Also train the biases of the adapted sites."""
    modules_to_save: tuple[str, ...] = ()
    """Modules to train in full and save with the adapter, each given by the end of its path."""
    start: str | None = None
    """Folder of a finished adapter, reparam's or PEFT's, to train further. It gives the method and the modules."""


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer. Names and meanings are those of transformers' TrainingArguments."""

    name: str = "adamw_torch"
    """Optimizer, as transformers names it. For paged_adamw_32bit, paged_adamw_8bit and adamw_8bit, reparam has its own
    implementations."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    schedule: str = "cosine"
    """Learning-rate schedule: cosine, linear, constant, constant_with_warmup, or another one of transformers."""
    warmup: float = 0.03
    """Number of linear warm-up steps; a value below 1 is a share of all steps."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Maximum norm of the gradient; a larger gradient is scaled down to it."""
    budget: int | str = "512MiB"
    """Maximum memory on the device for the states of a paged optimizer, in bytes or as 64MiB or 2GiB. The rest is paged
    out."""
    page: int | str = "1MiB"
    """Size of the pages that a paged optimizer moves, in bytes or as 1MiB."""
    lora_plus: float | None = None
    """LoRA+: learning rate of B as a multiple of optim.learning_rate; usually 16. --method lora+ sets it to 16."""
    lora_plus_embedding: float = 1e-6
    """LoRA+: learning rate of adapted embeddings, as an absolute value."""
    lora_plus_vectors: Literal["out", "in"] = "out"
    """LoRA+: whether biases, norms and DoRA's magnitudes have the learning rate of B (out) or of A (in)."""

    def __post_init__(self) -> None:
        _check(
            self,
            "optim",
            learning_rate=("a number above 0", finite(self.learning_rate) and self.learning_rate > 0),
            warmup=("a number of at least 0", finite(self.warmup) and self.warmup >= 0),
            weight_decay=("a number of at least 0", finite(self.weight_decay) and self.weight_decay >= 0),
            max_grad_norm=("a number of at least 0", self.max_grad_norm >= 0),
        )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Length of the run, batch size, checkpoints, and the output folder."""

    output: str = "out"
    """Output folder for the adapter, checkpoints, configuration, figures and plots."""
    epochs: float = 1.0
    """Number of passes over the training rows."""
    max_steps: int = -1
    """Number of optimizer steps. If it is above 0, run.epochs is ignored."""
    batch_size: int = 8
    """Rows per forward pass on each device."""
    accumulation: int = 1
    """Number of forward passes per optimizer step."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward and backward passes: float32, or bfloat16 with autocast. Independent of base.dtype."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    eval_every: int = 0
    """Number of steps between evaluations of the held-out loss; 0 means a tenth of the run."""
    save_every: int = 0
    """Number of steps between checkpoints; 0 means a tenth of the run."""
    keep: int = 2
    """Number of checkpoints to keep."""
    log_every: int = 10
    """Number of steps between log lines."""
    loggers: tuple[str, ...] = ()
    """Loggers of transformers, such as tensorboard, separated by commas."""
    resume: bool = True
    """Continue from the newest complete checkpoint in the output folder, if there is one."""
    fresh: bool = False
    """Delete what an earlier run wrote into the output folder, and start anew."""
    seed: int = 0
    """Seed of all random numbers: order of rows, dropout, initial values."""

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("batch_size", "accumulation", "keep", "log_every"), ("a whole number of at least 1", 1))
        counts |= dict.fromkeys(("eval_every", "save_every"), ("a whole number of at least 0", 0))
        _check(
            self,
            "run",
            epochs=("a number above 0", finite(self.epochs) and self.epochs > 0),
            max_steps=("-1 or a whole number of at least 1", self.max_steps == -1 or whole(self.max_steps, 1)),
            **{key: (text, whole(getattr(self, key), least)) for key, (text, least) in counts.items()},
        )

    def steps(self, examples: int) -> int:
        """Number of optimizer steps of a run over this many training examples."""
        rows = self.batch_size * self.accumulation
        return self.max_steps if self.max_steps > 0 else max(1, math.ceil(examples / rows * self.epochs))


@dataclasses.dataclass(frozen=True)
class Config:
    """The configuration of a run, by section."""

    base: BaseConfig = dataclasses.field(default_factory=BaseConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    method: Method = dataclasses.field(default_factory=lambda: METHODS["lora"]())
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)


SECTIONS: dict[str, type] = {
    "base": BaseConfig,
    "data": DataConfig,
    "adapter": AdapterConfig,
    "optim": OptimConfig,
    "run": RunConfig,
}


def resolve(file: str | Path | None, overrides: Mapping[str, Any]) -> Config:
    """Read a configuration from a TOML file, if one is given, and apply dotted overrides such as {"method.r": 8}.

    `lora+`, `lora++` and other method names for LoRA+ select LoRA and, unless it is set, set `optim.lora_plus` to 16;
    a warning says so.

    Raises ConfigError that lists all problems: a missing or malformed file, an unknown section or key (with the most
    similar known one), and a value of the wrong type or out of range.
    """
    tables = read_tables(Path(file)) if file is not None else {}
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        tables.setdefault(section, {})[name] = value
    _take_lora_plus(tables)
    problems = [
        f"unknown section [{section}]{nearest(section, [*SECTIONS, 'method'])}"
        for section in tables
        if section not in SECTIONS and section != "method"
    ]
    parts: dict[str, Any] = {}
    for section, cls in SECTIONS.items():
        table = tables.get(section, {})
        parts[section] = _base(table, problems) if section == "base" else build(cls, table, section, problems)
    settings = dict(tables.get("method", {}))
    settings.setdefault("seed", parts["run"].seed if parts["run"] else 0)
    try:
        cls = find_method(str(settings.pop("name", "lora")))
    except ValueError as error:
        problems.append(f"method.name: {error}")
    else:
        parts["method"] = build(cls, settings, "method", problems)
    if problems:
        where = f"{file}: " if file is not None else ""
        raise ConfigError(where + "; ".join(problems))
    return Config(**parts)


def dump(config: Config) -> str:
    """The configuration as TOML; `resolve` reads an equal configuration from it."""
    return tomli_w.dumps({s: {k: v for k, v in t.items() if v is not None} for s, t in tables(config).items()})


def tables(config: Config) -> dict[str, dict[str, Any]]:
    """The configuration as one table for each section, [method] with the method's name and settings."""
    found = {section: dataclasses.asdict(getattr(config, section)) for section in SECTIONS if section != "base"}
    found = {"base": config.base.table(), **found}
    found["method"] = {"name": config.method.name, **config.method.settings()}
    return found


def fields_of(section: str) -> dict[str, tuple[type, dataclasses.Field[Any]]]:
    """The keys of a section, each with its dataclass and field. [base] includes the settings of all storages."""
    cls = SECTIONS[section]
    found: dict[str, tuple[type, dataclasses.Field[Any]]] = {f.name: (cls, f) for f in dataclasses.fields(cls)}
    if section == "base":
        for group in ("reparam.storages", "reparam.methods"):
            load_installed(group)
        found = {key: found[key] for key in KEYS}
        for storage in STORAGES.values():
            for field in dataclasses.fields(storage):
                found.setdefault(field.name, (storage, field))
    return found


def read_tables(file: Path) -> dict[str, dict[str, Any]]:
    """Read the sections of a TOML file. Raises ConfigError for a missing or malformed file, or loose keys."""
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from None
    loose = [key for key, value in tables.items() if not isinstance(value, dict)]
    if loose:
        raise ConfigError(
            f"{file}: keys outside a section: {', '.join(loose)}; put them under one of [base], [data], ..."
        )
    return tables


def _take_lora_plus(tables: dict[str, dict[str, Any]]) -> None:
    """Replace a method name that means LoRA+ by the method LoRA and the setting `optim.lora_plus`."""
    name = str(tables.get("method", {}).get("name", "")).lower()
    if name not in LORA_PLUS:
        return
    tables["method"]["name"] = "lora"
    ratio = tables.setdefault("optim", {}).setdefault("lora_plus", USUAL_RATIO)
    doubled = ", the only known method with such a name" if name.endswith(("++", "plusplus")) else ""
    warnings.warn(
        f"method.name {name!r} is taken for LoRA+ (Hayou, Ghosh & Yu 2024, arXiv 2402.12354){doubled}: LoRA with "
        f"optim.lora_plus {ratio}",
        stacklevel=3,
    )


def build(cls: type, table: Mapping[str, Any], section: str, problems: list[str]) -> Any:
    """Build the dataclass of a section from its table. If that fails, append to `problems` and return None."""
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    unknown = [key for key in table if key not in fields and not (key == "seed" and section == "method")]
    problems += [f"unknown key {section}.{key}{nearest(key, fields)}" for key in unknown]
    if unknown:
        return None
    values = {key: _plain(value, str(fields[key])) for key, value in table.items() if key in fields}
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        for detail in error.errors():
            place = ".".join(str(part) for part in (section, *detail["loc"]))
            given = "" if detail["type"] == "value_error" else f" (given: {detail['input']!r})"
            text = detail["msg"].removeprefix("Value error, ")
            problems.append(text if text.startswith(f"{section}.") else f"{place}: {text}{given}")
        return None


def _base(table: Mapping[str, Any], problems: list[str]) -> BaseConfig | None:
    """Build the section [base] with the settings of its storage. If that fails, append to `problems`, return None."""
    before = len(problems)
    common, settings = split_keys(table, problems)
    chosen = None
    if len(problems) == before:
        chosen = build(find_storage(str(common.get("storage", "dense"))), settings, "base", problems)
    if chosen is None:  # check the other keys too, to report all problems
        build(BaseConfig, {key: value for key, value in common.items() if key != "storage"}, "base", problems)
        return None
    made: BaseConfig | None = build(BaseConfig, common | {"settings": chosen.settings()}, "base", problems)
    return made


def _plain(value: Any, annotation: str) -> Any:
    """Parse a string from the command line: "a,b" for a tuple, JSON for a mapping. Other values are unchanged."""
    if isinstance(value, str) and annotation.startswith("tuple"):
        return tuple(part for part in value.split(",") if part)
    if isinstance(value, str) and annotation.startswith("Mapping"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value
