"""Find the texts and the target of a row by content, if its keys are not those of the task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reparam.data.formats.format import check_strings
from reparam.data.messages import near_key
from reparam.errors import DataError

BESIDE = ("id", "idx", "index", "guid", "uid", "task", "source", "split", "lang", "language", "url")
"""Keys whose strings are about a row, not its content."""


def texts(
    given: Mapping[str, Any], source: str, names: Sequence[str], *, least: int, without: Sequence[str] = ()
) -> list[str]:
    """The keys of a row's texts, in the order of `names`, of which the first `least` are needed.

    Those are the names themselves, if the row has the first one; or else the keys of all strings, in the order of the
    row, if they are as many as names are needed or known. Raises DataError for other rows.
    """
    if names[0] in given:
        found = [name for name in names if given.get(name) is not None]
        if lacking := [name for name in names[:least] if name not in found]:
            raise DataError([f'{source}: "{names[0]}" without "{lacking[0]}"{near_key(given, lacking)}'])
    else:
        found = [
            key
            for key, value in given.items()
            if isinstance(value, str) and key not in without and key.lower() not in BESIDE
        ]
    if not least <= len(found) <= len(names):
        has = ", ".join(f'"{key}"' for key in (found or list(given))[:6]) or "no keys"
        wanted = " and ".join(f'"{name}"' for name in names[:least])
        example = ",".join(f"{name}={key}" for name, key in zip(names, [*found, "KEY", "KEY"], strict=False))
        why = "has several texts" if len(found) > len(names) else "has"
        raise DataError(
            [f"{source}: expected {wanted}; the row {why} {has}; name the keys to read: --data.columns {example}"]
        )
    check_strings({key: given[key] for key in found}, found, source)
    return found


def first_of(given: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of these keys that the row has, whatever the case; None if it has none."""
    own = {key.lower(): key for key in reversed(list(given))}
    return next((own[name] for name in names if name in own), None)
