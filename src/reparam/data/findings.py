"""Collect the problems and warnings of all rows during encoding, to report them together."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

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


class Findings:
    """The problems and warnings found in rows.

    Rows with the same problem or warning are reported together, all others one by one. With `bad_rows="drop"`, rows
    that cannot be trained on are marked as left out.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        vocab_size: int | None,
        bad_rows: BadRows = "error",
    ) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self.vocab_size = vocab_size
        """Number of rows of the model's input embedding, if it is known."""
        self._bad_rows = bad_rows
        self._refused: list[str] = []
        self._too_long: dict[str, tuple[int, int, list[str]]] = {}  # what -> rows, longest, names of the first rows
        self._beyond: dict[int, tuple[str, int]] = {}  # token id outside the vocabulary -> (first row, number of rows)
        self._numbers: dict[int, int] = {}  # id(row) -> number of the row, for the rows at hand
        self.marks: dict[str, array[int]] = {}
        """The rows that a warning is about, by their number, ascending."""
        self.reasons: dict[int, str] = {}
        """Why the first rows that are left out cannot be trained on."""

    def begin(self, rows: Sequence[Row], first: int) -> None:
        """Take the next rows; the number of the first one is `first`."""
        self._numbers = {id(row): first + i for i, row in enumerate(rows)}

    def refuse(self, row: Row, why: str) -> bool:
        """Record why a row cannot be trained on. Returns whether it is left out; otherwise it is an error."""
        if self._bad_rows == "drop":
            if len(self.reasons) < THREE:
                self.reasons[self._numbers[id(row)]] = why
            self.warn(row, BAD)
            return True
        self._refused.append(f"{row.source}: {why}")
        if len(self._refused) >= MOST:
            self.raise_problems()
        return False

    def too_long(self, row: Row, what: str, length: int) -> None:
        """Record a row of `length` tokens that is too long. Rows with the same `what` are reported together."""
        count, longest, names = self._too_long.get(what, (0, 0, []))
        if count < SHOWN:
            names.append(f"{row.source} ({length:,} tokens)")
        self._too_long[what] = (count + 1, max(longest, length), names)

    def check_vocabulary(self, row: Row, ids: np.ndarray) -> None:
        """Record the token ids that the model has no embedding for."""
        if self.vocab_size is not None and len(ids) and int(ids.max()) >= self.vocab_size:
            for token in set(ids[ids >= self.vocab_size].tolist()):
                first, count = self._beyond.get(token, (row.source, 0))
                self._beyond[token] = (first, count + 1)

    def warn(self, row: Row, what: str) -> None:
        """Record a warning about a row. Rows with the same `what` are reported together."""
        found, number = self.marks.setdefault(what, array("q")), self._numbers[id(row)]
        if not found or found[-1] != number:
            found.append(number)

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


def beyond_vocabulary(found: Mapping[int, tuple[str, int]], size: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The problems of token ids outside a vocabulary of `size`: id -> (first row, number of rows)."""
    return [
        f"{first}: the token {tokenizer.convert_ids_to_tokens(token)!r} has the id {token}, outside the "
        f"model's vocabulary of {size} ({counted(count, 'row')}); use the tokenizer that "
        "belongs to the model, or enlarge the model's embeddings"
        for token, (first, count) in sorted(found.items())
    ]
