"""The command that does a training run of the comparison again."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from typing import Any

from reparam.train.config import SECTIONS, Config, resolve


def command(config: Config) -> str:
    """`reparam train` with every setting that is not its default; `resolve` on these options gives an equal Config."""
    defaults = resolve(None, {"method.name": config.method.name})
    # A method's seed is the run's unless it has one of its own.
    defaults = dataclasses.replace(
        defaults, method=resolve(None, {"method.name": config.method.name, "run.seed": config.run.seed}).method
    )
    words = ["reparam", "train", *_option("method.name", config.method.name)]
    for section in [*SECTIONS, "method"]:
        own, usual = getattr(config, section), getattr(defaults, section)
        for field in dataclasses.fields(own):
            value = getattr(own, field.name)
            if value != getattr(usual, field.name):
                words += _option(f"{section}.{field.name}", value)
    return shlex.join(words)


def _option(key: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{key}" if value else f"--no-{key}"]
    if isinstance(value, tuple):
        return [f"--{key}", ",".join(str(part) for part in value)]
    if isinstance(value, Mapping):
        return [f"--{key}", json.dumps(dict(value))]
    return [f"--{key}", f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)]
