"""Read JSON without guesses: a key that occurs twice in an object is an error, not the last one of the two."""

from __future__ import annotations

import json
from typing import Any

from reparam.core.text import not_utf8
from reparam.errors import DuplicateKey


def loads(text: str | bytes) -> Any:
    """Parse JSON. Raises ValueError for invalid JSON, and DuplicateKey for a key that occurs twice.

    >>> loads('{"a": [1, 2]}')
    {'a': [1, 2]}
    >>> loads('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    reparam.errors.DuplicateKey: the key 'a' occurs twice; remove the wrong one
    >>> for text in ("[" * 100_000, "9" * 5000, b'"\\xff"'):
    ...     try:
    ...         loads(text)
    ...     except ValueError as error:
    ...         str(error)
    'it is nested too deeply'
    'a whole number has too many digits'
    'byte 0xff at offset 1 is not UTF-8'
    """
    try:
        if isinstance(text, str) and not text.startswith("\ufeff"):
            return _DECODER.decode(text)  # json.loads would make a decoder for each call
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(error)) from None
    except ValueError as error:
        if "set_int_max_str_digits" not in str(error):
            raise
        raise ValueError("a whole number has too many digits") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise DuplicateKey(f"the key {twice!r} occurs twice; remove the wrong one")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
