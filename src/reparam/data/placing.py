"""The places of images in a text, and the tokens that stand for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from reparam.data.offsets import Located
from reparam.data.row import Row


class Placed(NamedTuple):
    """The tokens of a text in which each image is written as many tokens. Positions are those of the short text."""

    tokens: Located
    """The tokens of the long text."""
    places: Sequence[tuple[int, int, int]]
    """For each image, in order: its start and end in the short text, and the length of what stands for it."""

    @property
    def ids(self) -> np.ndarray:
        """Token ids, [T] int32."""
        return self.tokens.ids

    def before(self, position: int) -> tuple[int, bool]:
        """As `Located.before`, for a position in the short text."""
        longer = sum(length - (end - start) for start, end, length in self.places if end <= position)
        return self.tokens.before(position + longer)

    def text_bytes(self, first: int, end: int) -> int:
        """As `Located.text_bytes`."""
        return self.tokens.text_bytes(first, end)

    def images(self) -> list[tuple[int, int]]:
        """The ranges of the tokens that stand for images."""
        return [(self.before(start)[0], self.before(end)[0]) for start, end, _ in self.places]


class Placing(Protocol):
    """How a vision-language model writes the images of rows."""

    mark: str
    """What stands for an image in the contents of rows."""
    token: str
    """What the chat template of the model writes for an image."""

    def written(self, text: str) -> str:
        """The text of a prompt without a chat template, with what the model writes for an image at each mark."""

    def located(self, row: Row, text: str) -> Placed:
        """The tokens of a text of this row, in which `token` stands for each image.

        Raises ValueError if it has other images than the row.
        """


def without(spans: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges [start, end) without what is in `others`; both are ascending.

    >>> without([(0, 9)], [(2, 4), (5, 6)])
    [(0, 2), (4, 5), (6, 9)]
    """
    found = []
    for start, end in spans:
        for first, last in others:
            if first < end and last > start:
                found += [(start, first)] if first > start else []
                start = last
        found += [(start, end)] if start < end else []
    return found
