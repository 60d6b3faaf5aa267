"""Plain text: all tokens carry loss."""

from __future__ import annotations

from typing import Any

from reparam.data.formats.format import Format, check_strings
from reparam.data.row import Row
from reparam.errors import DataError


def _read(value: dict[str, Any], source: str) -> Row:
    check_strings(value, ("text",), source)
    text = value.pop("text")
    if not text:
        raise DataError([f'{source}: "text" is empty'])
    return Row("text", source, text=text, columns=value)


FORMAT = Format(("text",), '{"text": "..."}', _read)
