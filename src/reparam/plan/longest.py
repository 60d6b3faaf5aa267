"""The longest batch of a run, which decides its peak."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from reparam.data.batches import Encoded
from reparam.data.packing import Packed
from reparam.train.config import Config


@dataclasses.dataclass(frozen=True)
class Longest:
    """The size of the longest batch."""

    rows: int
    tokens: int
    """Tokens of each row, with its padding."""
    loss: float
    """Share of these tokens that carry loss, from 0 to 1."""
    source: str
    """Where the sizes are from."""
    which: Sequence[int] = ()
    """The numbers of its rows in the data; none if the data is not known."""

    def __str__(self) -> str:
        return f"{self.rows} x {self.tokens} tokens"


def longest(config: Config, data: Encoded | None = None, packed: Packed | None = None) -> Longest:
    """The longest batch of training rows, or of packs of them; without data, rows of `data.max_length` with loss."""
    rows, most = config.run.batch_size, config.data.max_length
    if packed is not None or config.data.packing:
        return Longest(rows, most, 1.0, "packs are full", range(min(rows, len(packed or ()))))
    if data is None or config.data.streaming:
        return Longest(rows, most, 1.0, "data.max_length")
    which = data.lengths.argsort(descending=True, stable=True)[:rows].tolist()
    tokens = int(data.lengths[which[0]])
    loss = sum(int(data.loss[start : start + n].sum()) for start, n in zip(*_places(data, which), strict=True))
    return Longest(len(which), tokens, loss / (len(which) * tokens), "the longest training row", which)


def longest_text(config: Config, tokens: int) -> Longest:
    """The longest batch of a task that reads whole texts, of which the longest has so many tokens."""
    return Longest(config.run.batch_size, tokens, 1.0, "the longest text of the training rows")


def _places(data: Encoded, which: Sequence[int]) -> tuple[list[int], list[int]]:
    return data.starts[list(which)].tolist(), data.lengths[list(which)].tolist()
