"""The NF4 storage with double quantization: 4.127 bits per entry (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, §3).

The arithmetic is in `kernels/nf4.py`. Bits per entry with blocks of 64: 4 + 32/64 = 4.5 without double quantization,
4 + 8/64 + 32/(64 · 256) = 4.126953125 with it.

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
    """Configuration of the NF4 storage. Raises ValueError if `block` is not a power of two from 32 to 4096.

    >>> weight = NF4().quantize(torch.randn(128, 128))
    >>> sum(p.nbytes for p in weight.parameters()) * 8 / 128**2
    4.12890625
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"block": 32, "double": False})

    block: int = 64
    """Entries per block, which share one scale (absmax): a power of two from 32 to 4096."""
    double: bool = True
    """Double quantization: store the scales of the blocks in 8 bits instead of float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.block) is not int or self.block not in BLOCKS:
            raise ValueError(f"NF4: block={self.block!r}: expected one of {', '.join(map(str, BLOCKS))}")

    def quantize(self, w: Tensor) -> NF4Weight:
        """Quantize `w` [O, I]. Raises ValueError unless it is a non-empty matrix of finite floating-point values."""
        check_quantizable(w, self.name)
        codes, absmax = quantize(w, self.block)
        stats = compress_scales(absmax) if self.double else Statistics(absmax)
        return NF4Weight(codes, stats, self.block, (w.shape[0], w.shape[1]), w.dtype)


class NF4Weight(QuantizedWeight):
    """4-bit codes, and the largest magnitude (absmax) of each block.

    The tensors are those of a bitsandbytes file; its map of magnitudes is kept only if it is not the standard one.
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
        """The configuration: block size, and whether the magnitudes are doubly quantized."""
        return NF4(self.block, self.nested is not None)

    @property
    def statistics(self) -> Statistics:
        """The blocks' magnitudes, in float32 or doubly quantized, as views of the stored tensors."""
        if self.nested is None:
            return Statistics(floats(self.absmax))
        assert self.offset is not None
        own = None if self.map is None else floats(self.map)
        return Statistics(self.absmax, floats(self.nested), floats(self.offset), own)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., I] -> x Wᵀ + bias [..., O]."""
        return _linear(x, (self.codes, *self.statistics, self.block), self.shape, bias)

    def rows(self, ids: Tensor) -> Tensor:
        """ids [...] -> the rows W[ids] [..., I] in `dtype`."""
        ids = ids.long()  # an index into an embedding's entries can exceed 32 bits
        torch._assert_async(
            ((ids >= 0) & (ids < self.out_features)).all(), f"nf4: an id is not one of the {self.out_features} rows"
        )
        entries = ids.unsqueeze(-1) * self.in_features + torch.arange(self.in_features, device=ids.device)
        return self.at(entries).to(self.dtype)

    def at(self, entries: Tensor) -> Tensor:
        """entries [...], integers from 0 to n - 1 -> these entries of the flattened matrix, float32 [...]."""
        index = self._index(entries).long()
        return CODE.to(index.device)[index] * magnitudes(self.statistics, entries // self.block)

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """These rows of W in float32 [rows, I]; the slice must have step 1."""
        start, stop, step = rows.indices(self.out_features)
        assert step == 1, "rows must be a slice with step 1"
        stop = max(start, stop)
        return _rows(self.codes, self.statistics, self.block, self.in_features, start, stop, torch.float32)

    def write(self, out: Tensor, start: int = 0) -> None:
        """Write the rows W[start : start + rows] into `out` [rows, I], which is contiguous, in its dtype."""
        first, ahead = divmod(start * self.in_features, self.block)
        if ahead:
            stop = start + len(out)
            out.copy_(_rows(self.codes, self.statistics, self.block, self.in_features, start, stop, out.dtype))
        else:
            dequantize(
                self.codes, self.statistics, block=self.block, count=out.numel(), dtype=out.dtype, first=first, out=out
            )

    def neighbors(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The gaps to the levels above and below [rows, I], times the block's magnitude."""
        start, stop, _ = rows.indices(self.out_features)
        size = self.in_features
        entries = torch.arange(start * size, stop * size, device=self.device).view(-1, size)
        index = self._index(entries).long()
        absmax = magnitudes(self.statistics, entries // self.block)
        code = CODE.to(index.device)
        up, down = (code[(index + step).clamp(0, 15)] - code[index] for step in (1, -1))
        return up * absmax, down * absmax

    def coded(self, w: Tensor) -> NF4Weight:
        """The same magnitudes with the codes nearest to `w` [O, I]."""
        flat = w.reshape(-1)
        absmax = expand(self.statistics).repeat_interleave(self.block)[: len(flat)]
        scaled = flat / torch.where(absmax.abs() < TINY, TINY, absmax)
        return self._with(torch.bucketize(scaled, THRESHOLDS.to(w.device), out_int32=True).to(torch.uint8))

    def moved(self, steps: Tensor) -> NF4Weight:
        """The same magnitudes with `steps` int8 [O, I] added to the codes."""
        index = torch.stack([self.codes >> 4, self.codes & 15], 1).view(-1)[: steps.numel()]
        return self._with(index + steps.reshape(-1).to(torch.uint8))  # -1 becomes 255; the sum wraps around

    def _with(self, index: Tensor) -> NF4Weight:
        """The same magnitudes with these codes, uint8 [n]."""
        pairs = F.pad(index, (0, len(index) % 2), value=7).view(-1, 2)
        codes = pairs[:, 0] << 4 | pairs[:, 1]
        return NF4Weight(codes, copy.deepcopy(self.statistics), self.block, self.shape, self.dtype)

    def _index(self, entries: Tensor) -> Tensor:
        """The codes (0 to 15) of these entries [...] of the flattened matrix."""
        half = self.codes[entries >> 1]
        return torch.where(entries & 1 == 0, half >> 4, half & 15)


def _rows(
    codes: Tensor, stats: Statistics, block: int, inputs: int, start: int, stop: int, dtype: torch.dtype
) -> Tensor:
    """W[start:stop] [rows, I]: dequantize from the first block that contains them, then cut what precedes them."""
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
