"""Read a configuration file of LLaMA-Factory, Axolotl, TRL or torchtune as settings of reparam."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reparam.core.checks import nearest
from reparam.errors import ConfigError
from reparam.train.documents import read_yaml
from reparam.train.foreign.axolotl import AXOLOTL
from reparam.train.foreign.llama_factory import LLAMA_FACTORY
from reparam.train.foreign.rules import EMPTY, Given, Tool
from reparam.train.foreign.torchtune import TORCHTUNE
from reparam.train.foreign.trl import TRL
from reparam.train.switches import SWITCHES, switched

TOOLS = (LLAMA_FACTORY, AXOLOTL, TRL, TORCHTUNE)


@dataclasses.dataclass(frozen=True)
class Converted:
    """What a configuration of another tool is in reparam."""

    tool: str
    """The name of the tool."""
    settings: dict[str, Any]
    """Settings by dotted key, for `resolve`."""
    notes: tuple[str, ...]
    """Sentences about keys that have no counterpart and do not change the adapter."""
    defaults: tuple[str, ...]
    """Settings that are the tool's own defaults, because the file does not give them."""


def convert(file: Path, names: Mapping[str, str]) -> Converted:
    """Read a YAML file of LLaMA-Factory, Axolotl, TRL or torchtune.

    `names` are other names of settings, such as {"lora_r": "method.r"}. Settings that the file leaves out have the
    defaults of its tool. Raises ConfigError, with all problems, for a file that cannot be read or is of no known tool,
    and for keys that are unknown, or change the adapter and have no counterpart.
    """
    values = read_yaml(file)
    tool = _tool(file, values)
    given = Given(values)
    try:
        tool.special(given)
    except (TypeError, ValueError, AttributeError) as error:  # such as a number where the tool has a list
        raise ConfigError(f"{file} ({tool.name}): a value has another form than in {tool.name}: {error}") from None
    switches: dict[str, Any] = {}
    for key, value in list(given.values.items()):
        name = tool.renamed.get(key, key)
        setting = name if "." in name else names.get(name)
        if setting == "prefer.reward":
            given.refuse(key, "it names code to run, so it is taken from the command line alone: --reward")
        elif name in SWITCHES:
            switches |= {} if value is None else {name: value}
        elif setting is not None:
            if value is not None:
                given.put(setting, ",".join(map(str, value)) if isinstance(value, list) else value)
        elif value not in EMPTY and value not in ([], {}):
            _without_counterpart(given, tool, key, {*names, *SWITCHES})
    try:
        for key, value in switched(switches).items():
            given.put(key, value)
    except ConfigError as error:
        given.problems.append(str(error))
    if given.problems:
        raise ConfigError(f"{file} ({tool.name}): " + "; ".join(given.problems))
    own = {key: value for key, value in tool.defaults.items() if key not in given.settings and _applies(key, given)}
    defaults = tuple(f"{key} = {value}" for key, value in own.items())
    return Converted(tool.name, {**own, **given.settings}, tuple(given.notes), defaults)


def reason(key: str) -> str | None:
    """Why a key of one of the tools has no counterpart, or what to do instead; None for a key of none of them."""
    return next((texts[key] for tool in TOOLS for texts in (tool.notes, tool.refused) if key in texts), None)


def _applies(key: str, given: Given) -> bool:
    """Whether a default of the tool belongs to the run: those of LoRA do not for full fine-tuning."""
    if key == "data.holdout":
        return "data.valid" not in given.settings
    return not key.startswith("method.") or given.settings.get("method.name") != "full"


def _without_counterpart(given: Given, tool: Tool, key: str, known: set[str]) -> None:
    if key in tool.notes:
        given.note(key, tool.notes[key])
    elif key in tool.refused:
        given.refuse(key, f"{tool.refused[key]}; delete the key to train without it")
    else:
        near = nearest(key, [*known, *tool.renamed, *tool.notes, *tool.refused])
        given.refuse(key, f"it is unknown{near}; delete the key if the training does not need it")


def _tool(file: Path, values: Mapping[str, Any]) -> Tool:
    """The tool that a file is for, by the keys that only this tool has."""
    counts = {tool.name: len(values.keys() & set(tool.own)) for tool in TOOLS}
    best = max(TOOLS, key=lambda tool: counts[tool.name])
    if not counts[best.name]:
        raise ConfigError(
            f"{file}: not recognized as a configuration of {', '.join(counts)}; give a file of reparam with --config"
        )
    return best
