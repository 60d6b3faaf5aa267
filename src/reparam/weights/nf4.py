"""NF4 with double quantization: 4.127 bits an entry (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, §3).

The arithmetic is in `kernels/nf4.py`; this is the module that holds the result. Bits an entry, in blocks of 64:
4 + 32/64 = 4.5 plain, 4 + 8/64 + 32/(64 · 256) = 4.126953125 doubly quantized.

Shapes: n = O · I entries, N = ⌈n/block⌉ blocks, M = ⌈N/256⌉.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from reparam.core.base import Storage
from reparam.core.registry import storage
from reparam.kernels.frozen import frozen_linear
from reparam.kernels.nf4 import compress_scales, dequantize, few_rows, quantize
from reparam.kernels.nf4_reference import expand, magnitudes
from reparam.kernels.nf4_tables import BLOCKS, CODE, DYNAMIC, THRESHOLDS, TINY, Statistics
from reparam.weights.quantized import QuantizedWeight, bits, check_quantizable, floats, frozen


@storage("nf4")
@dataclasses.dataclass(frozen=True)
class NF4(Storage):
    """Configuration of NF4. Raises ValueError for a block size that the format does not have.

    >>> weight = NF4().quantize(torch.randn(128, 128))
    >>> sum(p.nbytes for p in weight.parameters()) * 8 / 128**2
    4.12890625
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"block": 32, "double": False})

    block: int = 64
    """Entries that share one magnitude: 32, 64, 128, ... 4096."""
    double: bool = True
    """Keep the magnitudes in 8 bits too."""

    def __post_init__(self) -> None:
        if type(self.block) is not int or self.block not in BLOCKS:
            raise ValueError(f"NF4: block={self.block!r}: expected one of {', '.join(map(str, BLOCKS))}")

    def quantize(self, w: Tensor) -> NF4Weight:
        """Quantize `w` [O, I]. Raises ValueError for what is no matrix, is not finite, or is quantized already."""
        check_quantizable(w, self.name)
        codes, absmax = quantize(w, self.block)
        stats = compress_scales(absmax) if self.double else Statistics(absmax)
        return NF4Weight(codes, stats, self.block, (w.shape[0], w.shape[1]), w.dtype)


class NF4Weight(QuantizedWeight):
    """Quantized codes, and the magnitude of each block.

    The tensors are those of a bitsandbytes file; its constant tables are kept only where they are not the standard.
    """

    def __init__(
        self, codes: Tensor, stats: Statistics, block: int, shape: tuple[int, int], dtype: torch.dtype
    ) -> None:
        super().__init__(shape, dtype, codes.device)
        self.block = block
        self.codes = frozen(codes)  # [⌈n/2⌉] uint8
        double = stats.nested is not None
        self.absmax = frozen(stats.absmax) if double else bits(stats.absmax)  # [N] uint8 or int32
        own = stats.map is not None and not torch.equal(stats.map, DYNAMIC.to(stats.map.device))
        self.nested = None if stats.nested is None else bits(stats.nested)  # [M]
        self.offset = None if stats.offset is None else bits(stats.offset)  # [1]
        self.map = bits(stats.map) if own and stats.map is not None else None  # [256]

    @property
    def storage(self) -> NF4:
        """Its block size, and whether magnitudes are doubly quantized."""
        return NF4(self.block, self.nested is not None)

    @property
    def statistics(self) -> Statistics:
        """The magnitudes as float32 or doubly quantized; views."""
        if self.nested is None:
            return Statistics(floats(self.absmax))
        assert self.offset is not None
        own = None if self.map is None else floats(self.map)
        return Statistics(self.absmax, floats(self.nested), floats(self.offset), own)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., I] -> x Wᵀ + bias [..., O]."""
        return _linear(x, (self.codes, *self.statistics, self.block), self.shape, bias)

    def rows(self, ids: Tensor) -> Tensor:
        """The rows W[ids], [..., I]."""
        ids = ids.long()  # 32 bits may be too few for the entries of an embedding
        torch._assert_async(
            ((ids >= 0) & (ids < self.out_features)).all(), f"nf4: an id is not one of the {self.out_features} rows"
        )
        entries = ids.unsqueeze(-1) * self.in_features + torch.arange(self.in_features, device=ids.device)
        return self.at(entries).to(self.dtype)

    def at(self, entries: Tensor) -> Tensor:
        """entries [...] of integers below n -> those of the flattened matrix in float32, [...]."""
        index = self._index(entries).long()
        return CODE.to(index.device)[index] * magnitudes(self.statistics, entries // self.block)

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """Rows of W in float32."""
        start, stop, step = rows.indices(self.out_features)
        assert step == 1, "rows are a plain slice"
        stop = max(start, stop)
        return _rows(self.codes, self.statistics, self.block, self.in_features, start, stop, torch.float32)

    def neighbors(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The gaps to the levels above and below, times the block's magnitude."""
        start, stop, _ = rows.indices(self.out_features)
        size = self.in_features
        entries = torch.arange(start * size, stop * size, device=self.device).view(-1, size)
        index = self._index(entries).long()
        absmax = magnitudes(self.statistics, entries // self.block)
        code = CODE.to(index.device)
        up, down = (code[(index + step).clamp(0, 15)] - code[index] for step in (1, -1))
        return up * absmax, down * absmax

    def coded(self, w: Tensor) -> NF4Weight:
        """The same magnitudes with the nearest codes."""
        flat = w.reshape(-1)
        absmax = expand(self.statistics).repeat_interleave(self.block)[: len(flat)]
        scaled = flat / torch.where(absmax.abs() < TINY, TINY, absmax)
        return self._with(torch.bucketize(scaled, THRESHOLDS.to(w.device), out_int32=True).to(torch.uint8))

    def moved(self, steps: Tensor) -> NF4Weight:
        """The same magnitudes with other codes."""
        index = torch.stack([self.codes >> 4, self.codes & 15], 1).view(-1)[: steps.numel()]
        return self._with(index + steps.reshape(-1).to(torch.uint8))  # -1 is 255 there, and wraps around

    def _with(self, index: Tensor) -> NF4Weight:
        """The same magnitudes with these codes, uint8 [n]."""
        pairs = F.pad(index, (0, len(index) % 2), value=7).view(-1, 2)
        codes = pairs[:, 0] << 4 | pairs[:, 1]
        return NF4Weight(codes, copy.deepcopy(self.statistics), self.block, self.shape, self.dtype)

    def _index(self, entries: Tensor) -> Tensor:
        """The codes, 0 to 15, of entries of the flattened matrix."""
        half = self.codes[entries >> 1]
        return torch.where(entries & 1 == 0, half >> 4, half & 15)


def _rows(
    codes: Tensor, stats: Statistics, block: int, inputs: int, start: int, stop: int, dtype: torch.dtype
) -> Tensor:
    """W[start:stop]: the whole blocks around these rows, less what is ahead of them."""
    first = start * inputs // block
    ahead = start * inputs - first * block
    count = ahead + (stop - start) * inputs
    found = dequantize(codes, stats, block=block, first=first, count=count, dtype=dtype)
    return found[ahead:].view(stop - start, inputs)


def _dequantize(
    codes: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    offset: Tensor | None,
    map: Tensor | None,
    block: int,
    shape: list[int],
    start: int,
    stop: int,
    dtype: torch.dtype,
) -> Tensor:
    return _rows(codes, Statistics(absmax, nested, offset, map), block, shape[1], start, stop, dtype)


def _product(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    offset: Tensor | None,
    map: Tensor | None,
    block: int,
    shape: list[int],
) -> Tensor | None:
    return few_rows(x, codes, Statistics(absmax, nested, offset, map), block, shape)


_linear = frozen_linear(
    "nf4",
    "Tensor codes, Tensor absmax, Tensor? nested, Tensor? offset, Tensor? map, int block",
    _dequantize,
    _product,
)
