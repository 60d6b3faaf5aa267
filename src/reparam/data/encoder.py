"""Encode rows, a batch at a time. What is made of a batch depends on its rows alone, so any process can make it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from reparam.data.chat import LossOn
from reparam.data.findings import BadRows, Found
from reparam.data.lengths import Lengths, TooLong
from reparam.data.made import Arrays
from reparam.data.row import Row
from reparam.data.tokenize import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Settings(NamedTuple):
    """How rows are encoded; the names are those of `data.encode.encode`."""

    max_length: int
    loss_on: LossOn = "answers"
    vocab_size: int | None = None
    too_long: TooLong = "auto"
    bad_rows: BadRows = "error"
    with_tasks: bool = False
    lenient: bool = False


class Made(NamedTuple):
    """What is made of a batch of rows."""

    arrays: Arrays
    found: Found
    columns: set[str]
    """Keys of the rows that no format reads."""
    uses: dict[str, bool]
    """Whether keys of messages and of chats changed a text."""
    kinds: Counter[str]
    """Number of rows of each kind."""


class Encoder:
    """Encodes batches of rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, how: Settings) -> None:
        self.how = how
        self._tokenize = Tokenizer(tokenizer, loss_on=how.loss_on)
        self._lengths = Lengths(
            max_length=how.max_length, too_long=how.too_long, with_tasks=how.with_tasks, lenient=how.lenient
        )

    def __call__(self, rows: Sequence[Row]) -> Made:
        """The examples of rows. Raises DataError for a chat template that cannot be used at all."""
        found = Found(rows, vocab_size=self.how.vocab_size, bad_rows=self.how.bad_rows)
        arrays = self._lengths(rows, self._tokenize(rows, found), found)
        columns = {key for row in rows for key in row.columns}
        return Made(arrays, found, columns, self._tokenize.uses(), Counter(row.kind for row in rows))
