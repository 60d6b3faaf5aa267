"""The flat sequence of all states: where in which page a parameter's are.

Parameters one after the other, each from a new block of 256 elements on, the blocks cut into pages. A page is its
fields one after the other, each for all blocks of the page. Shapes: N blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from reparam.optim.blockwise import BLOCK


class Field(NamedTuple):
    """One of the tensors that states consist of."""

    name: str
    dtype: torch.dtype
    width: int
    """How many there are for a block: 256, one per element, or 1."""

    @property
    def block_bytes(self) -> int:
        """Bytes for one block."""
        return self.dtype.itemsize * self.width


class Piece(NamedTuple):
    """A stretch of a parameter whose states are in one page."""

    parameter: Tensor
    elements: slice  # of the parameter, flat
    blocks: slice  # of the page


class Flat:
    """The order of parameters, and the size of pages: `page` bytes rounded down to whole blocks.

    >>> flat = Flat((Field("m", torch.float32, BLOCK),), page=2048)
    >>> small, large = torch.ones(3, 5), torch.ones(300)
    >>> flat.add(small), flat.add(large)
    (None, None)
    >>> [(index, [p.elements for p in pieces]) for index, pieces in flat.walk([small, large]).items()]
    [(0, [slice(0, 15, None), slice(0, 256, None)]), (1, [slice(256, 300, None)])]
    """

    def __init__(self, fields: tuple[Field, ...], *, page: int) -> None:
        self.fields = fields
        block = sum(field.block_bytes for field in fields)
        self._page_blocks = page // block
        self.page = self._page_blocks * block
        self._first: dict[Tensor, int] = {}  # parameter -> its first block, in order
        self._blocks = 0

    @property
    def pages(self) -> int:
        """How many there are."""
        return -(-self._blocks // self._page_blocks)

    def add(self, parameter: Tensor) -> None:
        """Put a parameter behind those that are there."""
        self._first[parameter] = self._blocks
        self._blocks += -(-parameter.numel() // BLOCK)

    def walk(self, parameters: Collection[Tensor]) -> dict[int, list[Piece]]:
        """The pieces of these parameters by page, both in order; an empty parameter has none."""
        walk: dict[int, list[Piece]] = {}
        for parameter in sorted(parameters, key=self._first.__getitem__):
            first, size = self._first[parameter], parameter.numel()
            begin, end = first, first - (-size // BLOCK)
            while begin < end:
                index = begin // self._page_blocks
                base = index * self._page_blocks
                stop = min(end, base + self._page_blocks)
                elements = slice((begin - first) * BLOCK, min(size, (stop - first) * BLOCK))
                walk.setdefault(index, []).append(Piece(parameter, elements, slice(begin - base, stop - base)))
                begin = stop
        return walk

    def cut(self, page: Tensor, blocks: slice) -> list[Tensor]:
        """The fields of some blocks of a page, uint8 [bytes], as views [N, width] in their own dtypes."""
        parts = page.split([field.block_bytes * self._page_blocks for field in self.fields])
        return [
            part.view(field.dtype).view(self._page_blocks, field.width)[blocks]
            for part, field in zip(parts, self.fields, strict=True)
        ]

    def empty(self, parameter: Tensor) -> dict[str, Tensor]:
        """A parameter's states by field, zero, on the CPU: in its shape, or [N] where there is one for each block."""
        blocks = -(-parameter.numel() // BLOCK)
        return {
            field.name: torch.zeros(parameter.shape if field.width == BLOCK else (blocks,), dtype=field.dtype)
            for field in self.fields
        }

    def beside(self, piece: Piece, page: Tensor, own: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The same stretch of the parameter's own states (as `empty` makes them) and of the page, field by field."""
        for field, part in zip(self.fields, self.cut(page, piece.blocks), strict=True):
            scale = BLOCK // field.width
            stretch = slice(piece.elements.start // scale, -(-piece.elements.stop // scale))
            flat = own[field.name].view(-1)[stretch]
            yield flat, part.view(-1)[: len(flat)]
