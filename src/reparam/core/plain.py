"""Check the types of values against those of dataclasses: plain JSON values before they are decoded, and settings."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from reparam.core.checks import listed, nearest
from reparam.errors import FormatError

T = TypeVar("T")
_NAMES: dict[Any, str] = {
    dict: "an object",
    Mapping: "an object",
    list: "a list",
    tuple: "a list",
    types.NoneType: "null",
    str: "a string",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
}


def decode(cls: type[T], value: object, where: object) -> T:
    """Build an instance of the dataclass `cls` from a JSON object.

    Supports str, int, float, bool, None, Literal, unions, lists, tuples, dictionaries and dataclasses. Raises
    FormatError, starting with `where`, that lists every value of a wrong type, every unknown key, and every missing key
    without a default.

    >>> from reparam.core.base import Site
    >>> decode(Site, {"name": "a", "kind": "linear", "out_features": 2, "in_features": "x"}, "file.json")
    Traceback (most recent call last):
    reparam.errors.FormatError: file.json: in_features: expected a whole number, found 'x'
    """
    problems = _problems(value, cls, "")
    if problems:
        raise FormatError(f"{where}: {listed(problems)}")
    return _made(value, cls)


def wrong_types(settings: Any) -> list[str]:
    """One message for each field of a dataclass whose value does not fit its declared type.

    A bool is no number, an int is also a float, a list is also a tuple, and NaN is a number: ranges are not checked.

    >>> from reparam.core.base import Site
    >>> wrong_types(Site("a", "linear", True, 2.5))
    ['out_features=True: expected a whole number', 'in_features=2.5: expected a whole number']
    """
    cls: Any = type(settings)
    hints = _hints(cls)
    names = [field.name for field in dataclasses.fields(settings)]
    return [problem for name in names for problem in _problems(getattr(settings, name), hints[name], name, True)]


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """The types of the fields; Any for a type whose name is known to type checkers alone."""
    try:
        return typing.get_type_hints(cls)
    except NameError:
        return {field.name: Any for field in dataclasses.fields(cls)}


def _problems(value: Any, hint: Any, key: str, setting: bool = False) -> list[str]:
    """The problems of a value of a file, or of a setting: these have other messages, and NaN is for their ranges."""
    kind = get_origin(hint) or hint
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _field_problems(value, kind, key)
    if kind in (Union, types.UnionType):
        found = {choice: _problems(value, choice, key, setting) for choice in get_args(hint)}
        close = [choice for choice, problems in found.items() if not problems] or _alike(value, get_args(hint))
        return (
            found[close[0]] if close else [_unfit(setting, key, " or ".join(_name(choice) for choice in found), value)]
        )
    if kind in (dict, Mapping) and isinstance(value, Mapping):
        names = [_unfit(setting, key, "names", k) for k in value if not isinstance(k, str)]
        return names + [p for k, v in value.items() for p in _problems(v, get_args(hint)[1], f"{key}[{k!r}]", setting)]
    if kind in (list, tuple) and isinstance(value, list | tuple):
        inner = get_args(hint)
        if kind is tuple and inner[-1] is not Ellipsis and len(inner) != len(value):
            return [f"{key}: expected {len(inner)} values, found {len(value)}"]
        each = inner if kind is tuple and inner[-1] is not Ellipsis else [inner[0]] * len(value)
        return [
            p for i, (v, h) in enumerate(zip(value, each, strict=True)) for p in _problems(v, h, f"{key}[{i}]", setting)
        ]
    if _fits(value, kind, hint) or (setting and kind is float and isinstance(value, float)):
        return []
    if setting and kind not in _NAMES and kind not in (Any, Literal):  # a type that files do not hold
        return (
            [] if not isinstance(kind, type) or isinstance(value, kind) else [_unfit(setting, key, _name(hint), value)]
        )
    return [_unfit(setting, key, _name(hint), value)]


def _alike(value: Any, choices: tuple[Any, ...]) -> list[Any]:
    """The members of a union that are the same kind of container as `value`: then its content is the problem."""
    kinds = {choice: get_origin(choice) or choice for choice in choices}
    if isinstance(value, dict):
        return [choice for choice, kind in kinds.items() if kind in (dict, Mapping) or dataclasses.is_dataclass(kind)]
    return [choice for choice, kind in kinds.items() if kind in (list, tuple) and isinstance(value, list)]


def _fits(value: Any, kind: Any, hint: Any) -> bool:
    if kind is Any:
        return True
    if kind is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if kind in (int, float) and type(value) is int:
        return -(2**63) <= value < 2**63  # the range of int64, which tensors and other JSON parsers use
    if kind is float:
        return isinstance(value, float) and math.isfinite(value)
    return kind in (str, int, bool, types.NoneType) and type(value) is kind


def _field_problems(value: dict[str, Any], cls: type, key: str) -> list[str]:
    hints = _hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    problems = [
        f"{key}.{k or repr(k)}".lstrip(".") + f": unknown key{nearest(k, fields)}" for k in value if k not in fields
    ]
    for name, field in fields.items():
        path = f"{key}.{name}".lstrip(".")
        if name in value:
            problems += _problems(value[name], hints[name], path)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{path}: missing")
    return problems


def _made(value: Any, hint: Any) -> Any:
    kind = get_origin(hint) or hint
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = _hints(kind)
        return kind(**{name: _made(v, hints[name]) for name, v in value.items()})
    if kind in (Union, types.UnionType):
        return _made(value, next(choice for choice in get_args(hint) if not _problems(value, choice, "")))
    if kind in (dict, Mapping):
        return {k: _made(v, get_args(hint)[1]) for k, v in value.items()}
    if kind in (list, tuple):
        inner = get_args(hint)
        made = [_made(v, inner[0] if kind is list or inner[-1] is Ellipsis else inner[i]) for i, v in enumerate(value)]
        return kind(made)
    return value


def _unfit(setting: bool, key: str, expected: str, value: Any) -> str:
    if setting:
        return f"{key}={_short(value)}: expected {expected}"
    return f"{key or 'content'}: expected {expected}, found {_short(value)}"


def _name(hint: Any) -> str:
    kind = get_origin(hint) or hint
    if kind is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(hint))
    return "an object" if dataclasses.is_dataclass(kind) else _NAMES.get(kind, getattr(kind, "__name__", str(kind)))


def _short(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"{_NAMES[type(value)]} of {len(value)}"
    large = type(value) is int and abs(value) >= 2**64  # Python refuses to write numbers of thousands of digits
    text = f"a number of {value.bit_length()} bits" if large else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
