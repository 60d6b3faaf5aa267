"""All encoded rows of a data set, in flat arrays, and the parts of it: training rows, held-out rows, a mixture.

Shapes: R rows that were read, E examples (a row has none, one or several), N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from torch import Tensor

from reparam.core.checks import nearest
from reparam.core.text import counted
from reparam.data.batches import BLOCK, Encoded, Report
from reparam.data.findings import BAD, THREE, beyond_vocabulary
from reparam.data.flat import TYPES, Growing
from reparam.data.made import Arrays
from reparam.data.tasks import COLUMN, missing
from reparam.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CUT, SPLIT, DROPPED = 1, 2, 4  # bits of `flags`


class Gathered:
    """The arrays of all batches of rows, one after another, and the names that they refer to by number."""

    def __init__(self, folder: Path | None = None) -> None:
        """With a folder, each array is written into the file of its name there."""
        self._of = {name: Growing(kind, None if folder is None else folder / name) for name, kind in TYPES.items()}
        self.names: dict[str, int] = {}
        self.tasks: dict[str, int] = {}
        self.largest = -1
        """The largest token id so far."""
        self.rows = 0
        """Number of rows so far."""

    def add(self, made: Arrays) -> None:
        """Add the arrays of the next batch."""
        of = dict(made.of)
        names = [self.names.setdefault(name, len(self.names)) for name in made.names]
        tasks = [*(self.tasks.setdefault(task, len(self.tasks)) for task in made.tasks), -1]  # -1 has no task
        of["file"] = np.array(names, dtype=np.int32).take(of["file"])
        of["task"] = np.array(tasks, dtype=np.int32)[of["task"]]
        of["row"] = of["row"] + self.rows
        self.rows += len(of["file"])
        self.largest = max(self.largest, int(of["ids"].max(initial=-1)))
        for name, values in of.items():
            self._of[name].extend(values)

    def arrays(self) -> dict[str, Tensor]:
        """All arrays. Nothing can be added after this."""
        return {name: array.values() for name, array in self._of.items()}


class Places(Sequence[str]):
    """Where examples come from, as "file:line": names and numbers instead of a string for each."""

    def __init__(self, names: Sequence[str], file: np.ndarray, line: np.ndarray) -> None:
        self._names, self._file, self._line = names, file, line

    def __len__(self) -> int:
        return len(self._file)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Places: ...
    def __getitem__(self, index: int | slice) -> str | Places:
        if isinstance(index, slice):
            return Places(self._names, self._file[index], self._line[index])
        line = int(self._line[index])
        return self._names[self._file[index]] + ("" if line < 0 else str(line))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class Corpus:
    """The encoded rows of a data set."""

    arrays: Mapping[str, Tensor]
    """The arrays of `flat.TYPES`, by name."""
    names: Sequence[str]
    """The names of places, such as "file:"."""
    tasks: Sequence[str]
    """The tasks that occur, if they were asked for."""
    marks: Mapping[str, Tensor]
    """The numbers of the rows that each warning is about, ascending, int64."""
    reasons: Mapping[int, str]
    """Why the first rows that were left out cannot be trained on, by their number."""
    unused: Sequence[str]
    """Keys of rows and messages that change nothing."""
    max_length: int
    largest: int
    """The largest token id."""
    kinds: Mapping[str, int] = field(default_factory=dict)
    """Number of rows of each kind: chat, completion and text."""
    counts: Sequence[int] = ()
    """Number of rows read from each source, in order."""
    notes: tuple[str, ...] = ()
    """What was left out while reading."""
    lines: tuple[str, ...] = ()
    """Where the arrays are kept."""

    def __len__(self) -> int:
        """Number of rows that were read."""
        return len(self.arrays["tokens"])

    def with_examples(self) -> np.ndarray:
        """Which rows have examples, [R] bool; the others were left out."""
        return np.bincount(self._of("row"), minlength=len(self)) > 0

    def check_vocabulary(self, size: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise DataError, with the first row of each, for token ids of at least `size`."""
        if self.largest < size:
            return
        ids = self._of("ids")
        found: dict[int, tuple[str, int]] = {}
        for start in range(0, len(ids), BLOCK):
            at = start + np.flatnonzero(ids[start : start + BLOCK] >= size)
            rows = self._of("row")[np.searchsorted(np.cumsum(self._of("lengths"), dtype=np.int64), at, side="right")]
            for token, row in sorted(set(zip(ids[at].tolist(), rows.tolist(), strict=True)), key=lambda pair: pair[1]):
                first, count = found.get(token, (self.place(row), 0))
                found[token] = (first, count + 1)
        raise DataError(beyond_vocabulary(found, size, tokenizer))

    def task_names(self, rows: np.ndarray | None = None) -> tuple[str, ...]:
        """The distinct tasks of the rows, sorted. Raises DataError that lists all rows without a task."""
        numbers = self._of("task") if rows is None else self._of("task")[rows]
        if (numbers < 0).any():
            without = np.flatnonzero(numbers < 0) if rows is None else rows[numbers < 0]
            raise DataError([missing(self.place(int(row))) for row in without])
        return tuple(sorted(self.tasks[number] for number in np.unique(numbers)))

    def place(self, row: int) -> str:
        """Where a row comes from."""
        return Places(self.names, self._of("file"), self._of("line"))[row]

    def part(self, rows: np.ndarray | None = None, *, tasks: Sequence[str] = (), notes: bool = True) -> Encoded:
        """The examples of these rows, in this order; a row may occur several times. By default, of all rows.

        With `tasks`, each example gets the index of its row's task. `notes` adds what was left out while reading to the
        report. Raises DataError if no row has examples, and for rows without a known task.
        """
        chosen = np.arange(len(self)) if rows is None else np.asarray(rows, dtype=np.int64)
        firsts = np.searchsorted(self._of("row"), np.arange(len(self) + 1))
        counts = (firsts[1:] - firsts[:-1])[chosen]
        before = np.cumsum(counts) - counts
        examples = np.repeat(firsts[:-1][chosen] - before, counts) + np.arange(counts.sum())
        report = self._report(chosen, examples, notes, exclude=(COLUMN,) if tasks else ())
        if not len(examples):
            raise DataError([f"no rows are left: {'; '.join(report.warnings) or 'there are none'}"])
        lengths = self._of("lengths").astype(np.int64)
        at = self._of("row")[examples]
        return Encoded(
            ids=self.arrays["ids"],
            loss=self.arrays["loss"],
            starts=torch.from_numpy((np.cumsum(lengths) - lengths)[examples]),
            lengths=torch.from_numpy(lengths[examples]),
            text_bytes=torch.from_numpy(self._of("text_bytes")[examples].astype(np.int64)),
            sources=Places(self.names, self._of("file")[at], self._of("line")[at]),
            report=report,
            tasks=torch.from_numpy(self._task_numbers(at, tasks)) if tasks else None,
        )

    def _task_numbers(self, rows: np.ndarray, names: Sequence[str]) -> np.ndarray:
        """Index in `names` of the tasks of rows."""
        known = {name: number for number, name in enumerate(names)}
        table = np.array([known.get(task, -2) for task in self.tasks] + [-1], dtype=np.int64)  # -1 has no task
        found = table[self._of("task")[rows]]
        problems = []
        for row in np.unique(rows[found < 0]).tolist():
            place, number = self.place(row), int(self._of("task")[row])
            if number < 0:
                problems.append(missing(place))
                continue
            name = self.tasks[number]
            problems.append(f"{place}: unknown task {name!r}; expected one of {', '.join(names)}{nearest(name, names)}")
        if problems:
            raise DataError(problems)
        return found

    def _report(self, rows: np.ndarray, examples: np.ndarray, notes: bool, exclude: Sequence[str]) -> Report:
        flags, tokens = self._of("flags")[rows], self._of("tokens")[rows]
        lengths, loss, text = (self._of(key)[examples] for key in ("lengths", "loss_tokens", "text_bytes"))
        return Report(
            rows=int(self.with_examples()[rows].sum()),
            examples=len(examples),
            tokens=int(lengths.sum(dtype=np.int64)),
            loss_tokens=int(loss.sum(dtype=np.int64)),
            text_bytes=int(text.sum(dtype=np.int64)),
            longest=int(tokens.max(initial=0)),
            truncated=int((flags & CUT > 0).sum()),
            split=int((flags & SPLIT > 0).sum()),
            dropped=int((flags & DROPPED > 0).sum()),
            lines=self.lines if notes else (),
            unused=tuple(key for key in self.unused if key not in exclude),
            warnings=(*(self.notes if notes else ()), *self._warnings(rows)),
        )

    def _warnings(self, rows: np.ndarray) -> list[str]:
        """All warnings about the rows, each with the number of rows and the first of them."""
        among = np.zeros(len(self), dtype=bool)
        among[rows] = True
        found = []
        for what, marked in self.marks.items():
            numbers = marked.numpy()[among[marked.numpy()]]
            if not len(numbers):
                continue
            count, first = counted(len(numbers), "row"), numbers[:THREE].tolist()
            more = ", ..." if len(numbers) > THREE else ""
            if what == BAD:
                told = [f"{self.place(row)}: {self.reasons[row]}" for row in first if row in self.reasons]
                found.append(f"{count} {BAD}{': ' if told else ''}{', '.join(told)}{more if told else ''}")
            elif what.startswith("max_length="):
                told = [f"{self.place(row)} ({self._of('tokens')[row]:,} tokens)" for row in first]
                found.append(f"{what} ({count}: {', '.join(told)}{more})")
            else:
                found.append(f"{what} ({count}, first {self.place(first[0])})")
        return found

    def _of(self, name: str) -> Any:
        return self.arrays[name].numpy()
