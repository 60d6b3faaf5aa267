"""Refuse words of a command line that would have no effect, or another one than meant."""

from __future__ import annotations

import re
from typing import Any

from reparam.core.checks import listed
from reparam.core.text import visible

TEXTS = ("prompt", "system")
"""Parameters of verbs that can be empty."""
_FOR = re.compile(r"With (--[\w-]+)(?: (\w+(?: or \w+)*))?:")


def check_words(command: Any, ctx: Any, words: list[str]) -> None:
    """Raise ValueError for a word that is not UTF-8, and for an empty word that stands for a path or a name.

    Files and tokenizers need UTF-8. An empty path, from a variable of the shell that is not set, would be the current
    folder.
    """
    for word in words:
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            raise ValueError(f"{visible(word)[:200]}: this word of the command line is not UTF-8")
    if "" not in words and not any(word.endswith("=") for word in words):
        return
    raw, _, _ = command.make_parser(ctx).parse_args(args=list(words))
    for parameter in command.get_params(ctx):
        value = raw.get(parameter.name)
        if "" in (value if isinstance(value, list | tuple) else [value]) and not _can_be_empty(parameter):
            name = parameter.opts[0] if parameter.param_type_name == "option" else parameter.name
            raise ValueError(f"{name}: the given word is empty; give a value, or leave it out")


def _can_be_empty(parameter: Any) -> bool:
    """Whether a parameter is a text, as are most settings of the configuration."""
    from reparam.train.config import PATHS

    key = parameter.name.replace("__", ".", 1)
    return parameter.name in TEXTS or ("." in key and key not in (*PATHS, "run.output"))


def check_apart(command: Any, ctx: Any) -> None:
    """Raise ValueError for options that have an effect only together with another one, which is not given.

    The help of such an option begins with the other one: "With --search: ..." or "With --space ties or dare: ...".
    """
    options = {name: p for p in command.params if p.param_type_name == "option" for name in p.opts}
    alone: dict[str, list[str]] = {}
    for parameter in command.params:
        found = _FOR.match(getattr(parameter, "help", None) or "")
        if found and ctx.get_parameter_source(parameter.name).name == "COMMANDLINE":
            other, values = options[found[1]], found[2]
            value = ctx.params[other.name]
            if value in (None, False) if values is None else value not in values.split(" or "):
                alone.setdefault(" ".join(filter(None, found.groups())), []).append(parameter.opts[0])
    problems = [
        f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} for {other}; add it, or leave "
        f"{' and '.join(names)} out"
        for other, names in alone.items()
    ]
    if problems:
        raise ValueError(listed(problems))
