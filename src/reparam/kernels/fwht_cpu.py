"""Walsh-Hadamard transforms, and Fastfood maps built on them, in float32 on a CPU, compiled by numba.

The references are in `fwht` and `fastfood`. The butterflies are LLVM code for vectors of 16 numbers: the four innermost
stages work within a vector, and up to four more across the 16 vectors that one pass loads. A transform of 2^8 numbers
reads and writes them once, one of 2^12 twice. Longer transforms are split into pieces that fit in the first-level cache
(2^12), then in the second-level cache (2^16); only the remaining stages go through main memory.

The order of summation depends only on the length, never on how the work is divided among threads. A Fastfood map
generates its random numbers as it goes (see `fastfood`), so each thread needs memory for only one block.

All is in one file because numba's cache checks only the age of the file of a kernel. Addresses are integers.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

from reparam.kernels.fastfood_tables import GAUSS_BITS, GOLDEN, MIX, ORDER_BITS, QUANTILES
from reparam.kernels.threads import compile_kernel, pointer, spread

_GRAIN = 1 << 17
"""Numbers that justify a thread: transforming them from memory takes 60 us, handing work to a thread 40 us."""
_FIRST, _SECOND = 1 << 12, 1 << 16
"""Numbers in a piece that fits in the first-level cache (16 KiB), and in the second-level cache (256 KiB)."""
_GROUPS = 32
"""The number of partial sums over blocks in the adjoint of a Fastfood map, independent of the number of threads."""
LANES = 16
_i32, _float = ir.IntType(32), ir.FloatType()
_vector = ir.VectorType(_float, LANES)
_Array = np.ndarray[Any, np.dtype[np.float32]]
_Words = np.ndarray[Any, np.dtype[np.uint64]]


def _within(b: Any, v: Any) -> Any:
    """LLVM code that transforms one vector [16]."""
    for step in (1, 2, 4, 8):
        places = ir.Constant(ir.VectorType(_i32, LANES), [lane ^ step for lane in range(LANES)])
        signs = ir.Constant(_vector, [-1.0 if lane & step else 1.0 for lane in range(LANES)])
        v = b.fadd(b.shuffle_vector(v, v, places), b.fmul(v, signs), flags=("contract",))
    return v


def _among(b: Any, vectors: list[Any]) -> list[Any]:
    """LLVM code that transforms across a list of vectors, separately for each lane."""
    step = 1
    while step < len(vectors):
        pairs = {k: (vectors[k & ~step], vectors[k | step]) for k in range(len(vectors))}
        vectors = [b.fsub(*pairs[k]) if k & step else b.fadd(*pairs[k]) for k in range(len(vectors))]
        step *= 2
    return vectors


def _pass(radix: int, *, inner: bool) -> Any:
    """f(to, from, jump, stride, count): `count` times, transform across `radix` vectors that are `stride` bytes apart.

    Each repetition starts `jump` bytes after the last. With `inner`, each vector is also transformed within itself.
    """

    def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
        to, source, jump, stride, count = args
        with cgutils.for_range(b, count) as loop:
            offset = b.mul(loop.index, jump)
            places = [b.add(offset, b.mul(stride, stride.type(k))) for k in range(radix)]
            pointers = [b.inttoptr(b.add(source, place), _vector.as_pointer()) for place in places]
            vectors = [b.load(p, align=4) for p in pointers]
            vectors = [_within(b, v) for v in vectors] if inner else vectors
            for place, vector in zip(places, _among(b, vectors), strict=True):
                b.store(vector, b.inttoptr(b.add(to, place), _vector.as_pointer()), align=4)
        return context.get_dummy_value()

    def typed(context: Any, to: Any, source: Any, jump: Any, stride: Any, count: Any) -> Any:
        return types.void(types.intp, types.intp, types.intp, types.intp, types.intp), emit

    return intrinsic(typed)


_inner1, _inner2, _inner4, _inner8, _inner16 = (_pass(radix, inner=True) for radix in (1, 2, 4, 8, 16))
_outer2, _outer4, _outer8, _outer16 = (_pass(radix, inner=False) for radix in (2, 4, 8, 16))


@numba.njit
def _begin(to: int, source: int, n: int) -> int:
    """The stages within vectors and up to four more, out of place. Returns the transform length reached."""
    vectors = n // 16
    if vectors >= 16:
        _inner16(to, source, 1024, 64, vectors // 16)
        return 256
    if vectors == 8:
        _inner8(to, source, 512, 64, 1)
    elif vectors == 4:
        _inner4(to, source, 256, 64, 1)
    elif vectors == 2:
        _inner2(to, source, 128, 64, 1)
    else:
        _inner1(to, source, 64, 64, 1)
    return n


@numba.njit
def _across(x: int, h: int, radix: int, count: int) -> None:
    """One in-place pass across `radix` adjacent pieces of `h` numbers, for the first `count` vectors of each piece."""
    if radix == 16:
        _outer16(x, x, 64, 4 * h, count)
    elif radix == 8:
        _outer8(x, x, 64, 4 * h, count)
    elif radix == 4:
        _outer4(x, x, 64, 4 * h, count)
    else:
        _outer2(x, x, 64, 4 * h, count)


@numba.njit
def _rest(x: int, n: int, h: int) -> None:
    """The stages from length `h` to `n`, in place."""
    while h < n:
        radix = min(16, n // h)
        for start in range(0, n, h * radix):
            _across(x + 4 * start, h, radix, h // 16)
        h *= radix


@numba.njit
def _short(to: int, source: int, n: int) -> None:
    """Transform fewer than 16 numbers."""
    x = numba.carray(pointer(source), (n,), np.float32)
    y = numba.carray(pointer(to), (n,), np.float32)
    for i in range(n):
        y[i] = x[i]
    h = 1
    while h < n:
        for start in range(0, n, 2 * h):
            for i in range(start, start + h):
                a, b = y[i], y[i + h]
                y[i] = a + b
                y[i + h] = a - b
        h *= 2


@numba.njit
def _transform(to: int, source: int, n: int) -> None:
    """Transform `n` numbers in one thread; `to` and `source` may be the same address."""
    if n < 16:
        _short(to, source, n)
        return
    second = min(n, _SECOND)
    first = min(n, _FIRST)
    for outer in range(0, n, second):
        for start in range(outer, outer + second, first):
            done = _begin(to + 4 * start, source + 4 * start, first)
            _rest(to + 4 * start, first, done)
        _rest(to + 4 * outer, second, first)
    _rest(to, n, second)


def fwht(out: Tensor, x: Tensor) -> None:
    """Write the transforms of the rows of `x` [N, n] into `out`; both contiguous float32, n a power of two."""
    rows, n = x.shape
    piece = min(n, _SECOND)
    worth = x.numel() // _GRAIN
    to, count = out.data_ptr(), rows * n // piece
    spread(_pieces, to, x.data_ptr(), count, piece, worth=min(worth, count), alive=(out, x))
    h = piece
    while h < n:
        radix = min(16, n // h)
        spread(_columns, to, rows * (n // (h * radix)), h, radix, worth=worth, alive=out)
        h *= radix


def _pieces_walk(to: int, source: int, count: int, n: int, share: int, shares: int) -> bool:
    """One of `shares` equal shares of `count` adjacent transforms of `n` numbers."""
    for piece in range(count * share // shares, count * (share + 1) // shares):
        _transform(to + 4 * n * piece, source + 4 * n * piece, n)
    return True


def _columns_walk(x: int, count: int, h: int, radix: int, share: int, shares: int) -> bool:
    """One of `shares` equal shares of the columns of a pass over `count` parts of `radix` pieces of `h` numbers."""
    columns = h // 16
    begin, end = columns * share // shares, columns * (share + 1) // shares
    for part in range(count):
        _across(x + 4 * (part * h * radix + 16 * begin), h, radix, end - begin)
    return True


# ---- Fastfood


def fastfood(out: Tensor, x: Tensor, key: int, n: int) -> None:
    """Write P x into `out` [D] for x [d], d <= n: contiguous float32. See `fastfood.fastfood`."""
    rows, blocks = out.numel(), -(-out.numel() // n)
    at = out.data_ptr(), x.data_ptr(), QUANTILES.data_ptr()
    worth = min(blocks, rows // (_GRAIN // 8))
    spread(_forward, *at, key, n, rows, x.numel(), worth=worth, alive=(out, x))


def fastfood_adjoint(g: Tensor, key: int, n: int, d: int) -> Tensor:
    """Pᵀ g [d] for g [D], contiguous float32."""
    rows, blocks = g.numel(), -(-g.numel() // n)
    groups = min(blocks, _GROUPS)
    sums = torch.zeros(groups, d)
    at = sums.data_ptr(), g.data_ptr(), QUANTILES.data_ptr()
    worth = min(groups, rows // (_GRAIN // 8))
    spread(_backward, *at, key, n, rows, d, groups, worth=worth, alive=(sums, g))
    return sums.sum(0)


@numba.njit
def _room(n: int) -> Any:
    """Working memory for one block: hashes, their order, digit counts, signs, normal numbers and two vectors."""
    hashes, counts, block = np.empty((2, n), np.uint64), np.empty((3, 256), np.int64), np.empty((4, n), np.float32)
    return hashes[0], hashes[1], counts, block[0], block[1], block[2], block[3]


@numba.njit
def _draw(
    words: _Words, spare: _Words, counts: np.ndarray[Any, np.dtype[np.int64]], key: int, first: int, quantiles: _Array,
    signs: _Array, gauss: _Array,
) -> float:  # fmt: skip
    """Generate a block's signs, normals and order (low halves of `spare`). Returns the sum of squared normals."""
    n = len(words)
    z0 = np.uint64(key)
    for i in range(n):
        z = z0 + np.uint64(first + i + 1) * np.uint64(GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(MIX[0])
        z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX[1])
        words[i] = z ^ (z >> np.uint64(31))
    counts[:] = 0
    half = np.uint64((1 << GAUSS_BITS) - 1)
    total = 0.0
    for i in range(n):
        z = words[i]
        signs[i] = np.float32(1) - np.float32(2) * np.float32(z & np.uint64(1))
        size = quantiles[np.int64((z >> np.uint64(2)) & half)]
        gauss[i] = -size if z & np.uint64(2) else size
        total += np.float64(size) * np.float64(size)
        place = z >> np.uint64(64 - ORDER_BITS)
        counts[0, np.int64(place & np.uint64(255))] += 1
        counts[1, np.int64((place >> np.uint64(8)) & np.uint64(255))] += 1
        counts[2, np.int64(place >> np.uint64(16))] += 1
        words[i] = (place << np.uint64(32)) | np.uint64(i)
    for digit in range(3):  # a stable radix sort, eight bits at a time
        before = 0
        for value in range(256):
            count = counts[digit, value]
            counts[digit, value] = before
            before += count
        source, target = (spare, words) if digit == 1 else (words, spare)
        shift = np.uint64(32 + 8 * digit)
        for i in range(n):
            word = source[i]
            byte = np.int64((word >> shift) & np.uint64(255))
            target[counts[digit, byte]] = word
            counts[digit, byte] += 1
    return total


def _forward_walk(
    out_at: int, x_at: int, table_at: int, key: int, n: int, rows: int, d: int, share: int, shares: int
) -> bool:
    """One of `shares` equal shares of the blocks of P x."""
    out = numba.carray(pointer(out_at), (rows,), np.float32)
    x = numba.carray(pointer(x_at), (d,), np.float32)
    quantiles = numba.carray(pointer(table_at), (1 << GAUSS_BITS,), np.float32)
    words, spare, counts, signs, gauss, u, v = _room(n)
    blocks = (rows + n - 1) // n
    for block in range(blocks * share // shares, blocks * (share + 1) // shares):
        squares = _draw(words, spare, counts, key, block * n, quantiles, signs, gauss)
        scale = np.float32(1 / np.sqrt(rows * squares))
        for i in range(d):
            u[i] = signs[i] * x[i]
        u[d:] = 0
        _transform(u.ctypes.data, u.ctypes.data, n)
        for i in range(n):
            v[i] = scale * gauss[i] * u[np.int64(spare[i] & np.uint64(0xFFFFFFFF))]
        _transform(v.ctypes.data, v.ctypes.data, n)
        for i in range(min(n, rows - block * n)):
            out[block * n + i] = v[i]
    return True


def _backward_walk(
    sums_at: int, g_at: int, table_at: int, key: int, n: int, rows: int, d: int, groups: int, share: int, shares: int
) -> bool:
    """One of `shares` equal shares of the groups of blocks of Pᵀ g; each group has its own sum."""
    sums = numba.carray(pointer(sums_at), (groups, d), np.float32)
    g = numba.carray(pointer(g_at), (rows,), np.float32)
    quantiles = numba.carray(pointer(table_at), (1 << GAUSS_BITS,), np.float32)
    words, spare, counts, signs, gauss, u, v = _room(n)
    blocks = (rows + n - 1) // n
    for group in range(groups * share // shares, groups * (share + 1) // shares):
        total = sums[group]
        for block in range(blocks * group // groups, blocks * (group + 1) // groups):
            squares = _draw(words, spare, counts, key, block * n, quantiles, signs, gauss)
            scale = np.float32(1 / np.sqrt(rows * squares))
            left = min(n, rows - block * n)
            for i in range(left):
                v[i] = g[block * n + i]
            v[left:] = 0
            _transform(v.ctypes.data, v.ctypes.data, n)
            for i in range(n):
                u[np.int64(spare[i] & np.uint64(0xFFFFFFFF))] = scale * gauss[i] * v[i]
            _transform(u.ctypes.data, u.ctypes.data, n)
            for i in range(d):
                total[i] += signs[i] * u[i]
    return True


_pieces = compile_kernel(_pieces_walk, fastmath=set())
_columns = compile_kernel(_columns_walk, fastmath=set())
_forward = compile_kernel(_forward_walk, fastmath=set())
_backward = compile_kernel(_backward_walk, fastmath=set())
