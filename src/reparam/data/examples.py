"""Encoded rows of a task other than causal language modeling: the tokens of their texts, and what is expected of each.

Shapes: E examples, B examples in a batch, T tokens of the longest text of a batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from reparam.core.text import counted
from reparam.data.batches import Report
from reparam.data.findings import beyond_vocabulary
from reparam.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Features = Mapping[str, Any]
"""What is known of an example, as plain values: lists of numbers, and numbers."""


@dataclasses.dataclass(frozen=True)
class Item:
    """A row of a task."""

    source: str
    """Where it comes from, as "file:line"."""
    texts: tuple[Any, ...]
    """Its texts in the order of the task; for token classification, one list of words."""
    target: Any = None
    """What is expected: a label, a number, a text or a list of tags; None if the row does not say."""
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """All other keys of the row."""


@dataclasses.dataclass(frozen=True, eq=False)
class Examples(Dataset[dict[str, Any]]):
    """A map-style dataset. `examples[i]` is the features of an example with `row`, its index."""

    features: Sequence[Features]
    """`input_ids` is a list of token ids, or a list of such lists for several texts."""
    items: Sequence[Item]
    """The rows, [E]."""
    report: Report

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.features[index], "row": torch.tensor(index)}

    @property
    def sources(self) -> list[str]:
        """Where each example comes from, as "file:line", [E]."""
        return [item.source for item in self.items]

    def digest(self) -> str:
        """SHA-256 of all examples, in their order."""
        return hashlib.sha256(json.dumps(list(map(dict, self.features)), sort_keys=True).encode()).hexdigest()

    def check_vocabulary(self, size: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise DataError, with the first row of each, for token ids of at least `size`."""
        found: dict[int, tuple[str, int]] = {}
        for item, features in zip(self.items, self.features, strict=True):
            for ids in texts_of(features):
                for token in sorted({token for token in ids if token >= size}):
                    first, count = found.get(token, (item.source, 0))
                    found[token] = (first, count + 1)
        if found:
            raise DataError(beyond_vocabulary(found, size, tokenizer))


def texts_of(features: Features) -> list[list[int]]:
    """The token ids of each text of an example."""
    ids = features["input_ids"]
    own = list(ids) if ids and isinstance(ids[0], list) else [ids]
    return [*own, features["labels"]] if features.get("decodes") else own


@dataclasses.dataclass(frozen=True)
class ExamplesReport(Report):
    """Counts of the rows of a task."""

    targets: str = ""
    """The classes with their numbers of rows, or the range of the numbers, for the report of a run."""

    def __str__(self) -> str:
        parts = [counted(self.rows, "row"), counted(self.tokens, "token"), f"longest row {self.longest:,}"]
        parts += [f"{counted(self.truncated, 'row')} truncated"] if self.truncated else []
        parts += [f"{counted(self.dropped, 'row')} left out"] if self.dropped else []
        return "; ".join([*parts, *([self.targets] if self.targets else [])])
