"""Read and encode preferences: pairs of a chosen and a rejected answer, and single answers that are good or bad.

Each answer is encoded as a row of supervised training is: by the chat template of the tokenizer, with the tokens of the
answer marked (`data/encode.py`). The marked tokens are those whose log-probabilities the objectives compare.

Shapes: P preferences, E encoded answers: 2 P for pairs (chosen, rejected, chosen, ...), else P.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reparam.data.batches import Encoded, Report
from reparam.data.encode import encode
from reparam.data.examples import Examples
from reparam.data.formats.preference import PAIR, read_judged, read_pair
from reparam.data.prompts import Prompts, check_vocabulary, read_items
from reparam.data.row import Row
from reparam.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, slots=True)
class Preference:
    """A pair of answers, the chosen one first, or a single answer."""

    source: str
    """Where it comes from, as "file:line"."""
    answers: tuple[Row, ...]
    good: bool = True
    """Whether the single answer, or the first one of a pair, is good."""


@dataclasses.dataclass(frozen=True, eq=False)
class Preferences:
    """Encoded preferences."""

    encoded: Encoded
    """All answers, each with its prompt; a pair's follow each other, the chosen one first."""
    good: Tensor
    """Whether each answer is good, [E] bool; of a pair, the chosen one is."""
    paired: bool

    def __len__(self) -> int:
        return len(self.encoded) // (2 if self.paired else 1)

    @property
    def sources(self) -> list[str]:
        """Where each preference comes from, as "file:line", [P]."""
        step = 2 if self.paired else 1
        return [source.removesuffix(" (chosen)") for source in self.encoded.sources[::step]]

    @property
    def report(self) -> Report:
        """Counts of the data set; its rows are the preferences."""
        return dataclasses.replace(self.encoded.report, rows=len(self))

    def check_vocabulary(self, size: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise DataError, with the first answer of each, for token ids of at least `size`."""
        check_vocabulary(self.encoded, size, tokenizer)

    def digest(self) -> str:
        """SHA-256 of all answers and of which of them are good."""
        return hashlib.sha256(self.encoded.digest().encode() + self.good.numpy().tobytes()).hexdigest()


def read_pairs(source: str | Path, columns: Mapping[str, str] | None = None) -> list[Preference]:
    """Read the pairs of a file, a glob, a folder, a data set or standard input, as `read_rows` reads rows.

    Raises DataError, with all problems, for a source that cannot be read, and for a row that is no pair.
    """
    return read_items(source, lambda value, place: [Preference(place, read_pair(value, place, columns))], expected=PAIR)


def read_answers(source: str | Path, columns: Mapping[str, str] | None = None) -> list[Preference]:
    """Read single answers with a label; a pair becomes a good and a bad answer. Otherwise as `read_pairs`."""
    return read_items(
        source,
        lambda value, place: [Preference(row.source, (row,), good) for row, good in read_judged(value, place, columns)],
        expected=PAIR,
    )


def encode_preferences(
    preferences: Sequence[Preference], tokenizer: PreTrainedTokenizerBase, **settings: Any
) -> Preferences:
    """Encode preferences that are all pairs, or all single answers. `settings` are those of `data.encode.encode`.

    Raises DataError, with all problems, as `encode` does, and for an answer that the chat template would split.
    """
    rows = [row for preference in preferences for row in preference.answers]
    encoded = encode(rows, tokenizer, **settings)
    expected = [row.source for row in rows]
    if list(encoded.sources) != expected:
        split = next(source for i, source in enumerate(encoded.sources) if source != expected[i % len(expected)])
        raise DataError(
            [
                f"{split}: the chat template writes each answer of this chat in another way, so the answers cannot be "
                "compared in one text; move all answers but the last into the prompt"
            ]
        )
    paired = any(len(preference.answers) == 2 for preference in preferences)
    good = [not index if paired else each.good for each in preferences for index in range(len(each.answers))]
    return Preferences(encoded, torch.tensor(good), paired)


def flat(examples: Encoded | Preferences | Prompts | Examples) -> Encoded:
    """The encoded texts, one after another: of preferences, those of all answers. Not for rows of other tasks."""
    assert not isinstance(examples, Examples)
    return examples if isinstance(examples, Encoded) else examples.encoded
