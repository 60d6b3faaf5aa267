"""Read JSON without guesses: a key that occurs twice in an object is an error, not the last one of the two."""

from __future__ import annotations

import json
from typing import Any

from reparam.errors import DuplicateKey


def loads(text: str | bytes) -> Any:
    """Parse JSON. Raises ValueError for invalid JSON, DuplicateKey for a key that occurs twice, and RecursionError.

    >>> loads('{"a": [1, 2]}')
    {'a': [1, 2]}
    >>> loads('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    reparam.errors.DuplicateKey: the key 'a' occurs twice; remove the wrong one
    """
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise DuplicateKey(f"the key {twice!r} occurs twice; remove the wrong one")
    return found
