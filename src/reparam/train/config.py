"""The configuration of a run: frozen dataclasses, read from TOML, overridden by dotted names, written beside results.

One table per section. `[method]` holds the method's `name` and its own settings, whatever method it is, so that a new
method needs nothing here.
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
import reparam.weights  # noqa: F401  (both fill their registries)
from reparam.core.checks import nearest
from reparam.core.method import Method
from reparam.core.registry import METHODS, STORAGES, find_method, find_storage, load_installed
from reparam.errors import ConfigError
from reparam.train.base import KEYS, split_keys
from reparam.train.base import BaseConfig as BaseConfig

# Names that users have for LoRA+, which is a rule of optimization and no method.
LORA_PLUS = ("lora+", "lora_plus", "loraplus", "lora++", "loraplusplus")
USUAL_RATIO = 16


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is learned, and what it is judged on."""

    train: str = ""
    """JSONL file of rows with messages, prompt and completion, or text."""
    valid: str | None = None
    """JSONL file that scores are computed on; by default a share of the training rows is held out."""
    holdout: float = 0.05
    """Share of the training rows that is held out when there is no valid file."""
    max_length: int = 1024
    """Longest row in tokens. Longer chats are cut at the end, longer texts are split."""
    loss_on: Literal["answers", "all"] = "answers"
    """Which tokens of chats and completions carry loss."""
    score_rows: int = 200
    """How many held-out rows are answered before and after training, to count exact matches."""


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Where the method goes."""

    targets: tuple[str, ...] | None = None
    """all-linear, attention, mlp, everything, ends of paths, or re: and a regular expression; several separated by
    commas. By default what is usual for the method: all-linear for most."""
    bias: bool = False
    """Also train the biases of the adapted sites."""
    modules_to_save: tuple[str, ...] = ()
    """Ends of paths of modules that train whole and are saved with the adapter."""


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """How it is optimized; names and meanings are those of transformers' TrainingArguments."""

    name: str = "adamw_torch"
    """Optimizer; paged_adamw_32bit, paged_adamw_8bit and adamw_8bit are reparam's own."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    schedule: str = "cosine"
    """Learning-rate schedule: cosine, linear, constant, constant_with_warmup and what else transformers knows."""
    warmup: float = 0.03
    """Steps of linear warm-up; a number below 1 is a share of all steps."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Largest norm of the gradient; larger ones are scaled down."""
    budget: int | str = "512MiB"
    """Most memory for a paged optimizer's states on the device: bytes, or 64MiB, 2GiB; the rest is paged out."""
    page: int | str = "1MiB"
    """How much a paged optimizer moves at a time."""
    lora_plus: float | None = None
    """LoRA+: the rate of B, as a multiple of the learning rate; 16 is usual, and what --method lora++ stands for."""
    lora_plus_embedding: float = 1e-6
    """LoRA+: the rate of adapted embeddings, no multiple of the learning rate."""
    lora_plus_vectors: Literal["out", "in"] = "out"
    """LoRA+: whether biases, norms and DoRA's magnitudes learn as fast as B (out) or as A (in)."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How long, how large, and where results go."""

    output: str = "out"
    """Folder for the adapter, checkpoints, configuration, figures and plots."""
    epochs: float = 1.0
    """Passes over the training rows."""
    max_steps: int = -1
    """Optimizer steps; when above 0 it counts instead of epochs."""
    batch_size: int = 8
    """Rows in one forward, on each device."""
    accumulation: int = 1
    """Forwards in one optimizer step."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of forward and backward; bfloat16 is autocast over whatever dtype the base has."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    eval_every: int = 0
    """Steps between evaluations of the held-out loss; 0 is a tenth of the run."""
    save_every: int = 0
    """Steps between checkpoints; 0 is a tenth of the run."""
    keep: int = 2
    """How many checkpoints are kept."""
    log_every: int = 10
    """Steps between log lines."""
    loggers: tuple[str, ...] = ()
    """tensorboard and the other loggers that transformers knows."""
    resume: bool = True
    """Continue from the newest whole checkpoint in the output folder, when there is one."""
    seed: int = 0
    """Seed of everything random: order of rows, dropout, initial values."""

    def steps(self, examples: int) -> int:
        """How many steps a run over that many training examples makes."""
        rows = self.batch_size * self.accumulation
        return self.max_steps if self.max_steps > 0 else max(1, math.ceil(examples / rows * self.epochs))


@dataclasses.dataclass(frozen=True)
class Config:
    """All sections."""

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
    """The configuration in a TOML file, if one is given, with dotted overrides such as {"method.r": 8} on top.

    The method `lora++`, as other names of LoRA+, is LoRA with `optim.lora_plus` 16 where that is not set; a warning
    says so.

    Raises ConfigError, with all problems at once: a file that is missing or malformed, an unknown section or key
    (naming the nearest), a value of the wrong type or out of range.
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
    """The configuration as TOML; `resolve` on it gives an equal one."""
    tables = {section: dataclasses.asdict(getattr(config, section)) for section in SECTIONS if section != "base"}
    tables = {"base": config.base.table(), **tables}
    tables["method"] = {"name": config.method.name, **config.method.settings()}
    return tomli_w.dumps({s: {k: v for k, v in t.items() if v is not None} for s, t in tables.items()})


def fields_of(section: str) -> dict[str, tuple[type, dataclasses.Field[Any]]]:
    """The keys of a section, each with its class and field; of [base] also the settings of all storages."""
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
    """The sections of a TOML file. Raises ConfigError where it is missing, malformed, or has keys outside a section."""
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from None
    loose = [key for key, value in tables.items() if not isinstance(value, dict)]
    if loose:
        raise ConfigError(
            f"{file}: {', '.join(loose)} stand outside a section; put them under one of [base], [data], ..."
        )
    return tables


def _take_lora_plus(tables: dict[str, dict[str, Any]]) -> None:
    """Put a method's name that means LoRA+ as the two settings that it stands for."""
    name = str(tables.get("method", {}).get("name", "")).lower()
    if name not in LORA_PLUS:
        return
    tables["method"]["name"] = "lora"
    ratio = tables.setdefault("optim", {}).setdefault("lora_plus", USUAL_RATIO)
    doubled = ", the only method that we know by that name" if name.endswith(("++", "plusplus")) else ""
    warnings.warn(
        f"method.name {name!r} is taken for LoRA+ (Hayou, Ghosh & Yu 2024, arXiv 2402.12354){doubled}: LoRA with "
        f"optim.lora_plus {ratio}",
        stacklevel=3,
    )


def build(cls: type, table: Mapping[str, Any], section: str, problems: list[str]) -> Any:
    """The dataclass made from a section's table, or None after adding to `problems`."""
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
            problems.append(f"{place}: {detail['msg'].removeprefix('Value error, ')}{given}")
        return None


def _base(table: Mapping[str, Any], problems: list[str]) -> BaseConfig | None:
    """The section [base] with the settings of its storage, or None after adding to `problems`."""
    before = len(problems)
    common, settings = split_keys(table, problems)
    chosen = None
    if len(problems) == before:
        chosen = build(find_storage(str(common.get("storage", "dense"))), settings, "base", problems)
    if chosen is None:  # the rest is judged all the same, so that one problem hides no other
        build(BaseConfig, {key: value for key, value in common.items() if key != "storage"}, "base", problems)
        return None
    made: BaseConfig | None = build(BaseConfig, common | {"settings": chosen.settings()}, "base", problems)
    return made


def _plain(value: Any, annotation: str) -> Any:
    """A string from the command line as the value it stands for: "a,b" for a tuple, JSON for a mapping."""
    if isinstance(value, str) and annotation.startswith("tuple"):
        return tuple(part for part in value.split(",") if part)
    if isinstance(value, str) and annotation.startswith("Mapping"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value
