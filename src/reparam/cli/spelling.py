"""Options as people type them who know the scripts of transformers: `--flag True`, `--lora-r 8`, `--target a b`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reparam.train.switches import SWITCHES, truth


def spelled(arguments: Sequence[str], parameters: Sequence[Any]) -> list[str]:
    """Rewrite the arguments of a verb, whose parameters are click's, so that click can parse them.

    - Hyphens in a name stand for underscores, and the other way round, if only that is the name of an option.
    - A flag may be followed by True or False: `--gradient_checkpointing False` is `--no-run.gradient_checkpointing`.
      Other flags, such as `--bf16`, may have no value: `--bf16` is `--bf16=true`.
    - Of a verb without positional arguments, several words after an option are one list: `--lora_target a b` is
      `--lora_target a,b`.
    """
    options = {name: p for p in parameters if p.param_type_name == "option" for name in [*p.opts, *p.secondary_opts]}
    positional = any(p.param_type_name == "argument" for p in parameters)
    found: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if word == "--":
            return [*found, word, *words]
        name, equal, value = word.partition("=")
        option = options.get(name)
        if option is None and name.startswith("--"):
            name = next((n for n in options if n.replace("-", "_") == name.replace("-", "_")), name)
            option = options.get(name)
        if option is None:
            found.append(word)
        elif option.is_flag:
            both = bool(option.secondary_opts)  # a flag of the configuration, not one of the verb
            meant = truth(value if equal else words[0] if words else "") if both else None
            if meant is not None and not equal:
                words.pop(0)
            found.append(name + equal + value if meant is None else _flag(option, name, meant))
        elif name.removeprefix("--") in SWITCHES and not equal:
            flag = bool({"true", "false"} & SWITCHES[name.removeprefix("--")].keys())
            bare = not words or words[0].startswith("-") or (flag and positional and truth(words[0]) is None)
            found += [f"{name}=true"] if flag and bare else [name, *words[:1]]
            words = words if flag and bare else words[1:]
        elif equal or not words:
            found.append(name + equal + value)
        else:
            listed = [words.pop(0)]
            while not positional and words and not words[0].startswith("-"):
                listed.append(words.pop(0))
            found += [name, ",".join(listed)]
    return found


def _flag(option: Any, name: str, meant: bool) -> str:
    """The spelling of a flag that is true or false; `name` may be its negative form, --no-..."""
    positive = (name in option.opts) == meant
    same = name in (option.opts if positive else option.secondary_opts)
    return name if same else (option.opts if positive else option.secondary_opts)[0]
