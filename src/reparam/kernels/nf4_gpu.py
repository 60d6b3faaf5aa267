"""NF4 on a GPU, in Triton: quantize, dequantize, and the product with a few rows. The ops are in `nf4`.

Quantizing and dequantizing produce the same bytes as `nf4_reference`: the reciprocal of a magnitude is correctly
rounded (`div_rn`; `/` is approximate in Triton), and dequantizing does not fuse products with sums. `matvec` reads the
codes once and never writes the matrix; it is for decoding one or a few tokens, where reading the weights dominates the
time. Products with more rows unpack the matrix and use cuBLAS.

All three kernels work on pieces: adjacent entries of one block, a power of two of them, so that a piece has one
magnitude. Blocks and pieces cover the flattened matrix: a row may start and end inside a piece, or between the two
codes of a byte.

The kernels are tested in Triton's interpreter on a CPU and compiled for GPUs, but have not run on a GPU yet.

Shapes: n entries, O out_features, I in_features, M rows of x; G pieces of L entries in a tile. Codes and statistics are
contiguous.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from reparam.kernels.nf4_tables import CODE, DYNAMIC, THRESHOLDS, TINY, Statistics

MOST_ROWS = 8
"""The maximum rows of x for `matvec`. Not measured: with 8 rows, a thread uses 128 registers on an H100."""
_TILE = 4096
"""Entries that four warps process at a time."""
_SPAN = 1024
"""The same for `matvec`: 8 entries per thread, so codes and x are loaded in one access and the same layout."""
_TINY = tl.constexpr(TINY)


def quantize(w: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Quantize a contiguous `w` to codes uint8 [⌈n/2⌉] and absmax float32 [⌈n/block⌉]."""
    n = w.numel()
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty((n + block - 1) // block, dtype=torch.float32, device=w.device)
    thresholds = _tables(w.device)[1]
    with torch.cuda.device_of(w):
        _quantize[(triton.cdiv(n, _TILE),)](w, codes, absmax, thresholds, n, len(codes), block, _TILE // block)
    return codes, absmax


def dequantize(out: Tensor, codes: Tensor, stats: Statistics, block: int, first: int = 0) -> None:
    """Fill `out` (contiguous; float32, float16 or bfloat16) with the entries from block number `first` on."""
    n, unit, codes = out.numel(), min(block, _TILE), codes[first * block // 2 :]
    code, _, dynamic = _tables(out.device)
    with torch.cuda.device_of(out):
        _dequantize[(triton.cdiv(n, _TILE),)](
            out, codes, code, stats.absmax, stats.nested, stats.offset, dynamic if stats.map is None else stats.map,
            n, len(codes), first, block, unit, _TILE // unit, enable_fp_fusion=False,
        )  # fmt: skip


def matvec(x: Tensor, codes: Tensor, stats: Statistics, block: int, shape: tuple[int, int]) -> Tensor:
    """x [M, I] -> x Wᵀ [M, O] in the dtype of x, summed in float32. `shape` is (O, I); M is at most `MOST_ROWS`."""
    rows, (outputs, inputs), x = len(x), shape, x.contiguous()
    assert 0 < rows <= MOST_ROWS, f"{rows} rows"
    y = x.new_empty(rows, outputs)
    unit = min(block, _SPAN)
    code, _, dynamic = _tables(x.device)
    with torch.cuda.device_of(x):
        _matvec[(outputs,)](
            y, x, codes, code, stats.absmax, stats.nested, stats.offset, dynamic if stats.map is None else stats.map,
            len(codes), rows, inputs, outputs, block, unit, _SPAN // unit, triton.next_power_of_2(rows),
        )  # fmt: skip
    return y


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Levels [16], thresholds [15] and the dynamic map [256] on this device."""
    return CODE.to(device), THRESHOLDS.to(device), DYNAMIC.to(device)


@triton.jit
def _quantize(w, codes, absmax, thresholds, n, size, BLOCK: tl.constexpr, G: tl.constexpr):  # type: ignore[no-untyped-def]
    """Quantize G blocks. Entries beyond the end read as zero: they change no magnitude and pad an odd count."""
    block = tl.program_id(0).to(tl.int64) * G + tl.arange(0, G)
    entry = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [G, BLOCK]
    x = tl.load(w + entry, mask=entry < n, other=0).to(tl.float32)
    c = tl.max(tl.abs(x), axis=1)
    tl.store(absmax + block, c, mask=block * BLOCK < n)
    x *= tl.div_rn(1.0, tl.maximum(c, _TINY))[:, None]
    x = tl.minimum(tl.maximum(x, -1.0), 1.0)
    index = tl.zeros([G, BLOCK], tl.int32)
    for t in tl.static_range(15):
        index += (x > tl.load(thresholds + t)).to(tl.int32)
    high, low = tl.split(tl.reshape(index, [G, BLOCK // 2, 2]))
    byte = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(codes + byte, (high * 16 + low).to(tl.uint8), mask=byte < size)


@triton.jit(do_not_specialize=["first"])
def _dequantize(  # type: ignore[no-untyped-def]
    out, codes, code, absmax, nested, offset, map, n, size, first,
    BLOCK: tl.constexpr, L: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Dequantize G pieces of L entries; `codes` and `out` start at block number `first`."""
    piece = tl.program_id(0).to(tl.int64) * G + tl.arange(0, G)
    c = _magnitude(absmax, nested, offset, map, first + piece * L // BLOCK, piece * L < n)
    byte = piece[:, None] * (L // 2) + tl.arange(0, L // 2)[None, :]
    high, low = _levels(codes, code, byte, byte < size)
    value = tl.interleave(high, low) * c[:, None]
    entry = piece[:, None] * L + tl.arange(0, L)[None, :]
    tl.store(out + entry, value.to(out.dtype.element_ty), mask=entry < n)


@triton.jit
def _matvec(  # type: ignore[no-untyped-def]
    y, x, codes, code, absmax, nested, offset, map, size, rows, inputs, outputs,
    BLOCK: tl.constexpr, L: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Multiply one row of W with M rows of x, of which the first `rows` exist.

    The first and last piece may include entries of neighboring rows of W; x is zero there. Large offsets are added to
    the pointers before the loop, because 64-bit integers cost several instructions each.
    """
    first = tl.program_id(0).to(tl.int64) * inputs  # index of the row's first entry
    start = first // L  # its first piece
    codes += start * (L // 2)
    room = size - start * (L // 2)
    before = (first - start * L).to(tl.int32)  # entries of that piece that belong to the previous rows
    row = tl.arange(0, M)[:, None, None]
    sums = tl.zeros([M, G, L // 2], tl.float32)
    for begin in tl.range(0, tl.cdiv(before + inputs, L), G, loop_unroll_factor=2):
        piece = begin + tl.arange(0, G)
        c = _magnitude(absmax, nested, offset, map, (start + piece) * L // BLOCK, piece * L < before + inputs)
        byte = piece[:, None] * (L // 2) + tl.arange(0, L // 2)[None, :]
        high, low = _levels(codes, code, byte, byte < room)
        column = (piece[:, None] * L + tl.arange(0, L)[None, :] - before)[None]  # [1, G, L]
        inside = (column >= 0) & (column < inputs) & (row < rows)
        some = tl.load(x + row * inputs + column, mask=inside, other=0).to(tl.float32)
        even, odd = tl.split(tl.reshape(some, [M, G, L // 2, 2]))
        sums += (even * high[None] + odd * low[None]) * c[None, :, None]
    total = tl.sum(tl.reshape(sums, [M, G * L // 2]), axis=1)
    row = tl.arange(0, M)
    tl.store(y + row * outputs + tl.program_id(0), total.to(y.dtype.element_ty), mask=row < rows)


@triton.jit
def _levels(codes, code, byte, mask):  # type: ignore[no-untyped-def]
    """The levels of the high and the low codes in these bytes."""
    pair = tl.load(codes + byte, mask=mask, other=0).to(tl.int32)
    return tl.load(code + pair // 16), tl.load(code + pair % 16)


@triton.jit
def _magnitude(absmax, nested, offset, map, block, mask):  # type: ignore[no-untyped-def]
    """The magnitudes of these blocks; they are doubly quantized if `nested` is given."""
    c = tl.load(absmax + block, mask=mask, other=0)
    if nested is not None:
        c = tl.load(map + c.to(tl.int32)) * tl.load(nested + block // 256, mask=mask, other=0) + tl.load(offset)
    return c
