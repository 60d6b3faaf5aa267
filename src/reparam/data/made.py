"""What is made of a batch of rows, in flat arrays with the names and types of `data.flat`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from reparam.data.answers import Span
from reparam.data.flat import TYPES
from reparam.data.row import Row
from reparam.data.tasks import task_of

_NUMBERED = re.compile(r"(.*?)([1-9]\d{0,17})", re.DOTALL)


class Arrays(NamedTuple):
    """The arrays, and the names that they refer to by number."""

    of: Mapping[str, np.ndarray]
    names: Sequence[str]
    tasks: Sequence[str]


class Collected:
    """Collects the examples of a batch of rows. Numbers of rows are those in the batch."""

    def __init__(self) -> None:
        self._ids: list[np.ndarray] = []
        self._spans: list[Span] = []  # with loss, in all tokens of the batch
        self._of: dict[str, list[int]] = {name: [] for name in TYPES if name not in ("ids", "loss", "loss_tokens")}
        self._tokens = 0
        self._names: dict[str, int] = {}
        self._tasks: dict[str, int] = {}

    def add_row(self, row: Row, tokens: int, flags: int, *, with_task: bool) -> None:
        """Add what is known of a row: its place, its length in tokens, its flags and, if it has one, its task."""
        name = row.source.rstrip("0123456789")
        number = row.source[len(name) :]
        line = int(number) if 0 < len(number) < 19 and number[0] != "0" else -1
        if number and line < 0 and (match := _NUMBERED.fullmatch(row.source)):
            name, line = match[1], int(match[2])
        name = name if line >= 0 else row.source
        task = task_of(row) if with_task else None
        of = self._of
        of["tokens"].append(tokens)
        of["file"].append(self._names.setdefault(name, len(self._names)))
        of["line"].append(line)
        of["task"].append(-1 if task is None else self._tasks.setdefault(task, len(self._tasks)))
        of["flags"].append(flags)

    def add(self, row: int, ids: np.ndarray, spans: Sequence[Span], text_bytes: int) -> None:
        """Add an example of the row with this number. `ids` is [T]; `spans` are the ranges of it with loss."""
        self._ids.append(ids)
        self._spans += [(self._tokens + first, self._tokens + end) for first, end in spans]
        self._of["lengths"].append(len(ids))
        self._of["text_bytes"].append(text_bytes)
        self._of["row"].append(row)
        self._tokens += len(ids)

    def arrays(self) -> Arrays:
        """All arrays."""
        loss = np.zeros(self._tokens, dtype=bool)
        for first, end in self._spans:
            loss[first:end] = True
        of = {name: np.array(values, dtype=TYPES[name]) for name, values in self._of.items()}
        starts = np.cumsum(of["lengths"], dtype=np.int64) - of["lengths"]
        of["loss"] = loss
        of["loss_tokens"] = np.add.reduceat(loss, starts, dtype=np.int32) if len(starts) else np.zeros(0, np.int32)
        of["ids"] = np.concatenate([np.zeros(0, dtype=np.int32), *self._ids])
        return Arrays(of, list(self._names), list(self._tasks))
