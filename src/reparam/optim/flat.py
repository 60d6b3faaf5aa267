"""The layout of all optimizer states in pages.

The parameters' states follow one another; each parameter starts a new block of 256 elements, and the blocks are divided
into pages. Within a page, each field is stored contiguously for all blocks of the page. Shapes: N blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from reparam.optim.blockwise import BLOCK


class Field(NamedTuple):
    """One tensor of the optimizer state: its name, its dtype and its width per block."""

    name: str
    dtype: torch.dtype
    width: int
    """Numbers per block: 256 (one per element) or 1."""

    @property
    def block_bytes(self) -> int:
        """Bytes per block."""
        return self.dtype.itemsize * self.width


class Piece(NamedTuple):
    """A range of a parameter's elements whose states are in one page."""

    parameter: Tensor
    elements: slice  # of the flattened parameter
    blocks: slice  # of the page


class Flat:
    """The order of the parameters in pages of `page` bytes, rounded down to whole blocks.

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
        self._first: dict[Tensor, int] = {}  # parameter -> number of its first block, in order
        self._blocks = 0

    @property
    def pages(self) -> int:
        """The number of pages."""
        return -(-self._blocks // self._page_blocks)

    def add(self, parameter: Tensor) -> None:
        """Append a parameter."""
        self._first[parameter] = self._blocks
        self._blocks += -(-parameter.numel() // BLOCK)

    def walk(self, parameters: Collection[Tensor]) -> dict[int, list[Piece]]:
        """The pieces of these parameters by page number, both in order. A parameter without elements has no pieces."""
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
        """The fields of these blocks of a page, uint8 [bytes], as views [N, width] in the fields' dtypes."""
        parts = page.split([field.block_bytes * self._page_blocks for field in self.fields])
        return [
            part.view(field.dtype).view(self._page_blocks, field.width)[blocks]
            for part, field in zip(parts, self.fields, strict=True)
        ]

    def empty(self, parameter: Tensor) -> dict[str, Tensor]:
        """Zero states of a parameter on the CPU, by field name: in its shape, or [N] for a field of width 1."""
        blocks = -(-parameter.numel() // BLOCK)
        return {
            field.name: torch.zeros(parameter.shape if field.width == BLOCK else (blocks,), dtype=field.dtype)
            for field in self.fields
        }

    def beside(self, piece: Piece, page: Tensor, own: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each field, flat views of the piece in `own` (the states as `empty` makes them) and in the page."""
        for field, part in zip(self.fields, self.cut(page, piece.blocks), strict=True):
            scale = BLOCK // field.width
            stretch = slice(piece.elements.start // scale, -(-piece.elements.stop // scale))
            flat = own[field.name].view(-1)[stretch]
            yield flat, part.view(-1)[: len(flat)]
