"""Read configuration files as tables: TOML, or YAML if the name ends so. Nothing in a file is executed."""

from __future__ import annotations

import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Any

from reparam.core.checks import listed
from reparam.core.text import not_utf8
from reparam.errors import ConfigError

LARGEST = 1 << 20  # bytes of a file
YAML = (".yaml", ".yml")


def read_tables(file: Path) -> dict[str, dict[str, Any]]:
    """Read the sections of a TOML or YAML file (UTF-8, with or without a byte order mark).

    In YAML, a section or a key without a value counts as not given. Raises ConfigError for a file that is missing,
    cannot be read or is malformed, or has loose keys.
    """
    if file.suffix.lower() in YAML:
        found = {key: value for key, value in read_yaml(file).items() if value is not None}
        tables = {key: _given(value) if isinstance(value, dict) else value for key, value in found.items()}
    else:
        try:
            tables = tomllib.loads(_content(file, "TOML"))
        except ConfigError:
            raise
        except (ValueError, RecursionError) as error:  # a number of too many digits is a plain ValueError
            raise ConfigError(f"{file}: not valid TOML: {error}") from None
    loose = [key for key, value in tables.items() if not isinstance(value, dict)]
    if loose:
        raise ConfigError(
            f"{file}: keys outside a section: {listed(loose, shown=4)}; put them under one of [base], [data], ..., "
            f"or pass a file of Axolotl, LLaMA-Factory or TRL as `reparam train --from {file}`"
        )
    return tables


def read_yaml(file: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file. Numbers and true or false are those of YAML 1.2, so 2e-4 is a number.

    Raises ConfigError, with line and column, for a file that is missing, larger than `LARGEST` or malformed, a key that
    occurs twice or is not a text, anchors and tags, and several documents.
    """
    import yaml

    text = _content(file, "YAML")
    try:
        found = yaml.load(text, Loader=_loader())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark is not None else ""
        raise ConfigError(f"{file}{place}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).split("\n")[0]
        raise ConfigError(f"{file}: not valid YAML: {reason}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: holds no keys; expected lines such as  key: value")
    return found


def _given(table: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if value is not None}


def _content(file: Path, kind: str) -> str:
    """The text of a file, without a byte order mark. Raises ConfigError for anything but a small regular file."""
    try:
        found = os.stat(file)
        if not stat.S_ISREG(found.st_mode):
            what = "a folder" if file.is_dir() else "not a regular file"
            raise ConfigError(f"{file}: is {what}; give a TOML or YAML file")
        if found.st_size > LARGEST:
            raise ConfigError(f"{file}: {found.st_size:,} bytes, more than the {LARGEST:,} that a {kind} file can have")
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: {not_utf8(error)}") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None


# The core schema of YAML 1.2. PyYAML's own is that of 1.1, in which 2e-4 is a text, `on` is true and 012 is 10.
_PLAIN = {
    "null": (r"(?:~|null|Null|NULL|)$", "~nN\0"),
    "bool": (r"(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    "int": (r"(?:[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+)$", "-+0123456789"),
    "float": (
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
}


def _loader() -> type:
    """PyYAML's loader of plain values, without anchors and tags, with the scalars of `_PLAIN` and unique keys."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own form)
        yaml_constructors: dict[str | None, Any] = {}  # noqa: RUF012

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise _problem(event.start_mark, "anchors (&, *) are not read; write the values out")
            return super().compose_node(parent, index)

    def number(loader: Any, node: Any) -> int:
        text = node.value.replace("_", "")
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)

    def decimal(loader: Any, node: Any) -> float:
        text = node.value.lower()
        return float(text.replace(".", "") if text.endswith(("inf", "nan")) else text)

    def mapping(loader: Any, node: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in node.value:
            key = loader.construct_object(name, deep=True)
            if not isinstance(key, str):
                raise _problem(name.start_mark, f"the key {key!r} is not a text; put it in quotes")
            if key in found:
                raise _problem(name.start_mark, f"the key {key!r} occurs twice; delete one of the two")
            found[key] = loader.construct_object(value, deep=True)
        return found

    def refused(loader: Any, node: Any) -> None:
        raise _problem(node.start_mark, f"the tag {node.tag.removeprefix('tag:yaml.org,2002:')!r} is not read")

    made: dict[str, Any] = {
        "null": lambda loader, node: None,
        "bool": lambda loader, node: node.value.lower() == "true",
        "int": number,
        "float": decimal,
        "str": lambda loader, node: loader.construct_scalar(node),
        "seq": lambda loader, node: [loader.construct_object(one, deep=True) for one in node.value],
        "map": mapping,
    }
    for name, (pattern, first) in _PLAIN.items():
        starts = [char if char != "\0" else "" for char in first]
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(pattern), starts)
    for name, construct in made.items():
        Loader.add_constructor(f"tag:yaml.org,2002:{name}", construct)
    Loader.add_constructor(None, refused)
    return Loader


def _problem(mark: Any, text: str) -> Exception:
    import yaml

    return yaml.MarkedYAMLError(problem=text, problem_mark=mark)
