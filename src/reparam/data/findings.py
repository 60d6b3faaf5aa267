"""Collect the problems and warnings of all rows during encoding, to report them together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from reparam.core.text import counted
from reparam.data.row import Row
from reparam.errors import SHOWN, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Findings:
    """The problems and warnings found in rows.

    Rows with the same problem or warning are reported together, all others one by one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int, vocab_size: int | None) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._vocab_size = vocab_size
        self._refused: list[str] = []
        self._no_answer: list[tuple[str, int]] = []  # (source, tokens) of rows without any answer left
        self._beyond: dict[int, list[str]] = {}  # token id outside the vocabulary -> rows
        self._odd: dict[str, list[str]] = {}  # warning -> rows

    def refuse(self, row: Row, why: str) -> None:
        """Record why a row cannot be trained on."""
        self._refused.append(f"{row.source}: {why}")

    def answer_cut_off(self, row: Row, length: int) -> None:
        """Record a row of `length` tokens whose whole answer lies beyond the maximum length."""
        self._no_answer.append((row.source, length))

    def check_vocabulary(self, row: Row, ids: Sequence[int]) -> None:
        """Record the token ids that the model has no embedding for."""
        if self._vocab_size is not None and max(ids, default=0) >= self._vocab_size:
            for token in {i for i in ids if i >= self._vocab_size}:
                self._beyond.setdefault(token, []).append(row.source)

    def warn(self, row: Row, what: str) -> None:
        """Record a warning about a row. Rows with the same `what` are reported together."""
        self._odd.setdefault(what, []).append(row.source)

    def warnings(self) -> tuple[str, ...]:
        """All warnings, each with the number of rows and the first of them."""
        return tuple(
            f"{what} ({counted(len(sources), 'row')}, first {sources[0]})" for what, sources in self._odd.items()
        )

    def raise_problems(self) -> None:
        """Raise DataError if any row cannot be trained on."""
        problems = [*self._answers_cut_off(), *self._refused, *self._beyond_vocabulary()]
        if problems:
            raise DataError(problems)

    def _answers_cut_off(self) -> list[str]:
        if not self._no_answer:
            return []
        names = [f"{source} ({length:,} tokens)" for source, length in self._no_answer[:SHOWN]]
        names += ["..."] if len(self._no_answer) > SHOWN else []
        needed = max(length for _, length in self._no_answer)
        return [
            f"max_length={self._max_length} cuts off the whole answer of {counted(len(self._no_answer), 'row')}: "
            f"{', '.join(names)}; max_length={needed} keeps all of them"
        ]

    def _beyond_vocabulary(self) -> list[str]:
        return [
            f"{sources[0]}: the token {self._tokenizer.convert_ids_to_tokens(token)!r} has the id {token}, outside the "
            f"model's vocabulary of {self._vocab_size} ({counted(len(sources), 'row')}); use the tokenizer that "
            "belongs to the model, or enlarge the model's embeddings"
            for token, sources in sorted(self._beyond.items())
        ]
