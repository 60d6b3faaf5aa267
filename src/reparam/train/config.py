"""The configuration of a run: read from TOML or YAML, overridden by dotted keys, saved with the results.

Each section is a table. `[method]` holds the `name` and the settings of the method, so that a new method needs no
change in this file.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import TypeAdapter, ValidationError

import reparam.methods
import reparam.weights  # noqa: F401  (these imports register methods and storages)
from reparam.core.checks import nearest
from reparam.core.method import Method
from reparam.core.registry import METHODS, STORAGES, find_method, find_storage, load_installed
from reparam.core.strict_json import loads
from reparam.data.files import split_sources
from reparam.data.templates import is_path
from reparam.errors import ConfigError, DuplicateKey
from reparam.train.base import KEYS, split_keys
from reparam.train.base import BaseConfig as BaseConfig
from reparam.train.documents import read_tables
from reparam.train.sections import AdapterConfig, DataConfig, OptimConfig, PreferConfig, RunConfig

# Names that users give to LoRA+, which is an optimization rule, not a method.
LORA_PLUS = ("lora+", "lora_plus", "loraplus", "lora++", "loraplusplus")
USUAL_RATIO = 16
PATHS = ("base.path", "data.train", "data.valid", "data.chat_template", "adapter.start", "method.experts")
"""Keys whose values are paths of inputs. A run with other paths is the same run if their content is the same."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The configuration of a run, by section."""

    base: BaseConfig = dataclasses.field(default_factory=BaseConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    method: Method = dataclasses.field(default_factory=lambda: METHODS["lora"]())
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    prefer: PreferConfig = dataclasses.field(default_factory=PreferConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)


SECTIONS: dict[str, type] = {
    "base": BaseConfig,
    "data": DataConfig,
    "adapter": AdapterConfig,
    "optim": OptimConfig,
    "prefer": PreferConfig,
    "run": RunConfig,
}


def resolve(file: str | Path | None, overrides: Mapping[str, Any]) -> Config:
    """Read a configuration from a TOML or YAML file, if one is given, and apply overrides such as {"method.r": 8}.

    `lora+`, `lora++` and other method names for LoRA+ select LoRA and, unless it is set, set `optim.lora_plus` to 16;
    a warning says so.

    Raises ConfigError that lists all problems: a missing or malformed file, an unknown section or key (with the most
    similar known one), and a value of the wrong type or out of range.
    """
    tables = read_tables(Path(file)) if file is not None else {}
    if "reward" in tables.get("prefer", {}):
        raise ConfigError(
            f"{file}: prefer.reward names code to run, so it is taken from the command line alone: --reward"
        )
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
    if parts["run"] and not parts["run"].output:
        problems.append("run.output: expected a folder, found an empty text")
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


def check_inputs(config: Config) -> None:
    """Raise ConfigError if the base model or the training rows are not given."""
    missing = [key for key, value in (("base.path", config.base.path), ("data.train", config.data.train)) if not value]
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)} must be set, as an option (--{missing[0]} ...) or in the configuration file"
        )


def dump(config: Config, *, absolute: bool = False) -> str:
    """The configuration as TOML; `resolve` reads an equal configuration from it, except for `prefer.reward`.

    With `absolute`, existing paths of `PATHS` are written as absolute paths, so that any folder can use the file.
    """
    found = {s: {k: v for k, v in t.items() if v is not None} for s, t in tables(config).items()}
    found["prefer"].pop("reward", None)  # code is taken from the command line alone
    for key in PATHS if absolute else ():
        section, _, name = key.partition(".")
        if name in found[section] and not (key == "data.chat_template" and not is_path(found[section][name])):
            value = found[section][name]
            several = split_sources(value) if key in ("data.train", "data.valid") else ()
            found[section][name] = _absolute(several if len(several) > 1 else value)
    return tomli_w.dumps(found)


def _absolute(path: Any) -> Any:
    if isinstance(path, str):
        return os.path.abspath(path) if os.path.exists(path) else path
    return [_absolute(part) for part in path]


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


@functools.cache
def _validator(cls: type) -> TypeAdapter[Any]:
    """The validator of a dataclass. Making one takes ten times as long as using it."""
    return TypeAdapter(cls)


def build(cls: type, table: Mapping[str, Any], section: str, problems: list[str]) -> Any:
    """Build the dataclass of a section from its table. If that fails, append to `problems` and return None."""
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    unknown = [key for key in table if key not in fields and not (key == "seed" and section == "method")]
    problems += [_unknown(cls, key, section) for key in unknown]
    if unknown:
        return None
    try:
        values = {key: _plain(value, str(fields[key])) for key, value in table.items() if key in fields}
        # pydantic takes true for 1
        booleans = [k for k, v in values.items() if _holds_bool(v) and not re.search("bool|Any", str(fields[k]))]
        if booleans:
            problems += [f"{section}.{k}: expected no true or false (given: {values[k]!r})" for k in booleans]
            return None
        return _validator(cls).validate_python(values)
    except DuplicateKey as error:
        problems.append(f"{section}: {error}")
        return None
    except ValidationError as error:
        for detail in error.errors():
            place = ".".join(str(part) for part in (section, *detail["loc"]))
            given = "" if detail["type"] == "value_error" else f" (given: {detail['input']!r})"
            text = detail["msg"].removeprefix("Value error, ")
            problems.append(text if text.startswith(f"{section}.") else f"{place}: {text}{given}")
        return None


def _unknown(cls: type, key: str, section: str) -> str:
    """The problem of a key that the section's class lacks; a setting of other methods is said to be theirs."""
    near = nearest(key, [field.name for field in dataclasses.fields(cls)])
    owners = [name for name, other in METHODS.items() if key in {field.name for field in dataclasses.fields(other)}]
    if section != "method" or not owners:
        return f"unknown key {section}.{key}{near}"
    others = f" and {len(owners) - 3} more" if len(owners) > 3 else ""
    return (
        f"method.{key} is a setting of {', '.join(owners[:3])}{others}, and method.name is {cls.name}: leave it out, "  # type: ignore[attr-defined]
        f"or choose another method.name{near}"
    )


def _holds_bool(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_bool, value.values()))
    return any(map(_holds_bool, value)) if isinstance(value, list | tuple) else isinstance(value, bool)


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
    if annotation.startswith(("tuple[int", "tuple[float")) and isinstance(value, int | float):
        return (value,)
    if isinstance(value, str) and annotation.startswith("tuple"):
        return tuple(part for part in value.split(",") if part)
    if isinstance(value, str) and annotation.startswith("Mapping"):
        try:
            return loads(value)
        except json.JSONDecodeError:
            return value
    return value
