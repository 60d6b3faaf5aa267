"""The formats of rows, one file each, and how they are told apart: by their keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reparam.data.formats import alpaca, chat, completion, sharegpt, text
from reparam.data.formats.format import Format
from reparam.data.messages import near_key
from reparam.data.row import Row
from reparam.errors import DataError

FORMATS: tuple[Format, ...] = (chat.FORMAT, sharegpt.FORMAT, completion.FORMAT, alpaca.FORMAT, text.FORMAT)
NAMES = ", or ".join(" and ".join(f'"{key}"' for key in each.keys) for each in FORMATS)
PREFERENCE = {"chosen", "rejected"}


def read_row(value: Mapping[str, Any], source: str, columns: Mapping[str, str] | None = None) -> Row:
    """The row that an object of a file holds. `source` says where it stands, for error messages and `Row.source`.

    `columns` says under which key of the object a key of a format is; then only the formats of these keys are tried.
    Raises DataError, with all problems, for an object that matches none or several of the formats, and for values of a
    wrong type.
    """
    columns = columns or {}
    given = renamed(value, source, columns)
    tried = [each for each in FORMATS if not columns or set(each.keys) & columns.keys()]
    matching = [each for each in tried if all(key in given for key in each.keys)]
    beside = {key for each in matching for key in each.beside}
    matching = [each for each in matching if not set(each.keys) <= beside]
    if len(matching) == 1:
        return matching[0].read(given, source)
    if matching:
        keys = ", ".join(f'"{key}"' for each in matching for key in each.keys)
        wanted = ",".join(f"{key}={key}" for key in matching[0].keys)
        raise DataError(
            [f"{source}: several formats in one row ({keys}); keep one, or choose one with --data.columns {wanted}"]
        )
    raise DataError([f"{source}: {_why_none(given, tried)}"])


def renamed(value: Mapping[str, Any], source: str, columns: Mapping[str, str]) -> dict[str, Any]:
    """The object under the keys of a format. Raises DataError if it lacks a key that `columns` names."""
    if missing := [column for column in columns.values() if column not in value]:
        raise DataError([f'{source}: no "{missing[0]}", which data.columns names{near_key(value, missing[:1])}'])
    given = {key: held for key, held in value.items() if key not in columns.values()}
    return given | {key: value[column] for key, column in columns.items()}


def _why_none(given: Mapping[str, Any], tried: list[Format]) -> str:
    if given.keys() >= PREFERENCE:
        return (
            'the row is a preference ("chosen" and "rejected"), and supervised training needs one answer; train on '
            "preferences with --objective dpo, orpo or kto"
        )
    for each in tried:
        present = [key for key in each.keys if key in given]
        if present:
            lacks = next(key for key in each.keys if key not in given)
            return f'"{present[0]}" without "{lacks}"{near_key(given, [lacks])}'
    has = ", ".join(f'"{key}"' for key in list(given)[:6]) or "no keys"
    hint = near_key(given, [key for each in tried for key in each.keys])
    hint = hint or "; name the keys to read with --data.columns, such as prompt=question,completion=answer"
    return f"expected {NAMES}; the row has {has}{hint if given else ''}"
