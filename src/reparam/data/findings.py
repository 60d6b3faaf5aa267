"""Collect the problems and warnings of rows during encoding, a batch at a time, to report them together."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from reparam.core.surface import can_set
from reparam.core.text import counted
from reparam.data.row import Row
from reparam.errors import SHOWN, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BadRows = Literal["error", "drop"]
MOST = 10_000  # problems after which reading stops
THREE = 3  # rows that a message about rows that were cut or left out shows
BAD = "cannot be trained on, so they are left out"
CUTS = "max_length={} cuts off tokens that would carry loss"
LEFT_OUT = "max_length={} is too short, so these are left out"


class Found:
    """The problems and warnings found in a batch of rows. Numbers of rows are those in the batch."""

    def __init__(self, rows: Sequence[Row], *, vocab_size: int | None, bad_rows: BadRows) -> None:
        self._numbers = {id(row): number for number, row in enumerate(rows)}
        self._vocab_size, self._bad_rows = vocab_size, bad_rows
        self.refused: list[str] = []
        self.too_long_rows: dict[str, tuple[int, int, list[str]]] = {}
        """Of each kind of rows that are too long: their number, the longest, the names of the first ones."""
        self.beyond: dict[int, tuple[str, int]] = {}
        """Token id outside the vocabulary -> (first row, number of rows)."""
        self.marks: dict[str, list[int]] = {}
        self.reasons: dict[int, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_numbers": {}}  # it holds for the row objects of one process

    def refuse(self, row: Row, why: str) -> bool:
        """Record why a row cannot be trained on. Returns whether it is left out; otherwise it is an error."""
        if self._bad_rows == "drop":
            if len(self.reasons) < THREE:
                self.reasons[self._numbers[id(row)]] = why
            self.warn(row, BAD)
            return True
        self.refused.append(f"{row.source}: {why}")
        return False

    def too_long(self, row: Row, what: str, length: int) -> None:
        """Record a row of `length` tokens that is too long. Rows with the same `what` are reported together."""
        add_too_long(self.too_long_rows, what, (1, length, [f"{row.source} ({length:,} tokens)"]))

    def check_vocabulary(self, row: Row, ids: np.ndarray) -> None:
        """Record the token ids that the model has no embedding for."""
        if self._vocab_size is not None and len(ids) and int(ids.max()) >= self._vocab_size:
            for token in set(ids[ids >= self._vocab_size].tolist()):
                first, count = self.beyond.get(token, (row.source, 0))
                self.beyond[token] = (first, count + 1)

    def warn(self, row: Row, what: str) -> None:
        """Record a warning about a row. Rows with the same `what` are reported together."""
        found, number = self.marks.setdefault(what, []), self._numbers[id(row)]
        if not found or found[-1] != number:
            found.append(number)


class Findings:
    """The problems and warnings found in all batches.

    Rows with the same problem or warning are reported together, all others one by one. With `bad_rows="drop"`, rows
    that cannot be trained on are marked as left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int, vocab_size: int | None) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        self.vocab_size = vocab_size
        """Number of rows of the model's input embedding, if it is known."""
        self._refused: list[str] = []
        self._too_long: dict[str, tuple[int, int, list[str]]] = {}
        self._beyond: dict[int, tuple[str, int]] = {}
        self.marks: dict[str, array[int]] = {}
        """The rows that a warning is about, by their number, ascending."""
        self.reasons: dict[int, str] = {}
        """Why the first rows that are left out cannot be trained on."""

    def add(self, found: Found, first: int) -> None:
        """Add what was found in the next batch; `first` is the number of its first row.

        Raises DataError if there are too many problems by now.
        """
        self._refused += found.refused
        for what, rows in found.too_long_rows.items():
            add_too_long(self._too_long, what, rows)
        for token, (place, count) in found.beyond.items():
            place, before = self._beyond.get(token, (place, 0))
            self._beyond[token] = (place, before + count)
        for what, numbers in found.marks.items():
            self.marks.setdefault(what, array("q")).extend(first + number for number in numbers)
        for number, why in list(found.reasons.items())[: THREE - len(self.reasons)]:
            self.reasons[first + number] = why
        if len(self._refused) >= MOST:
            self.raise_problems()

    def clear(self) -> None:
        """Forget the warnings about the rows so far."""
        self.marks, self.reasons = {}, {}

    def raise_problems(self) -> None:
        """Raise DataError if any row cannot be trained on."""
        problems = [*self._lengths(), *self._refused]
        if self.vocab_size is not None:
            problems += beyond_vocabulary(self._beyond, self.vocab_size, self._tokenizer)
        if problems:
            raise DataError(problems)

    def _lengths(self) -> list[str]:
        drop = ", and --data.too_long drop leaves them out" if can_set("--data.too_long") else ""
        return [
            f"max_length={self._max_length} {what} {counted(count, 'row')}: {', '.join(names)}"
            f"{', ...' if count > SHOWN else ''}; max_length={longest} keeps all of them{drop}"
            for what, (count, longest, names) in self._too_long.items()
        ]


def add_too_long(to: dict[str, tuple[int, int, list[str]]], what: str, more: tuple[int, int, Sequence[str]]) -> None:
    """Add rows that are too long: their number, the longest, the names of the first ones."""
    count, longest, names = to.get(what, (0, 0, []))
    to[what] = (count + more[0], max(longest, more[1]), [*names, *more[2][: SHOWN - len(names)]])


def beyond_vocabulary(found: Mapping[int, tuple[str, int]], size: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The problems of token ids outside a vocabulary of `size`: id -> (first row, number of rows)."""
    return [
        f"{first}: the token {tokenizer.convert_ids_to_tokens(token)!r} has the id {token}, outside the "
        f"model's vocabulary of {size} ({counted(count, 'row')}); use the tokenizer that "
        "belongs to the model, or enlarge the model's embeddings"
        for token, (first, count) in sorted(found.items())
    ]
