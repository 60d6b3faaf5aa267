"""Build the `reparam train` command that repeats a training run of the comparison."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from typing import Any

from reparam.train.base import BaseConfig
from reparam.train.config import SECTIONS, Config, resolve


def command(config: Config) -> str:
    """Return `reparam train` with all settings that differ from their defaults.

    `resolve` on these options gives an equal Config.
    """
    defaults = resolve(None, {"method.name": config.method.name})
    # A method's seed defaults to run.seed.
    defaults = dataclasses.replace(
        defaults, method=resolve(None, {"method.name": config.method.name, "run.seed": config.run.seed}).method
    )
    words = ["reparam", "train", *_option("method.name", config.method.name)]
    for section in [*SECTIONS, "method"]:
        own, usual = getattr(config, section), _values(getattr(defaults, section))
        if section == "base":  # compare with the defaults of this storage, and name it unless it is dense
            usual = BaseConfig(storage=own.storage).table() | {"storage": usual["storage"]}
        for name, value in _values(own).items():
            if value != usual[name]:
                words += _option(f"{section}.{name}", value)
    return shlex.join(words)


def _values(section: Any) -> dict[str, Any]:
    if isinstance(section, BaseConfig):
        return section.table()
    return {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}


def _option(key: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{key}" if value else f"--no-{key}"]
    if isinstance(value, tuple):
        return [f"--{key}", ",".join(str(part) for part in value)]
    if isinstance(value, Mapping):
        return [f"--{key}", json.dumps(dict(value))]
    return [f"--{key}", f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)]
