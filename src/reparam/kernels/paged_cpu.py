"""Attention of single tokens over a paged cache, for float32 on a CPU, compiled by numba. Its reference is in `paged`.

Keys and values are read where the cache has them, once for all heads that share them, in blocks whose softmax is
corrected by the largest score so far. So nothing is copied or padded, and the result of a request does not depend on
the others.

Shapes as in `paged`; L = `_BLOCK` keys of a block, G = H / K heads that share a key head.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from torch import Tensor

from reparam.kernels.threads import compile_kernel, pointer, spread

_BLOCK = 64
"""Keys of a block, whose scores stay in the nearest cache."""
_GRAIN = 1 << 20
"""Multiply-adds that justify a thread."""
_MATHS = {"reassoc", "contract", "nsz"}  # needed to vectorize sums; NaN and infinity still propagate
_LOWEST = np.float32(-87)
"""Below it, exp would not be a normal number."""
_Array = np.ndarray[Any, np.dtype[np.float32]]
_Integers = np.ndarray[Any, np.dtype[np.int32]]


def run(
    out: Tensor, query: Tensor, keys: Tensor, values: Tensor, index: Tensor, spans: Tensor, scale: float, total: int
) -> None:
    """Like `paged.attend_paged_`; `total` is the number of keys of all requests."""
    _, heads, width = out.shape
    shared = keys.shape[1]
    at = (out, query, keys, values, index, spans)
    sizes = (len(spans), heads, shared, width, query.stride(0), query.stride(1), keys.stride(0), values.stride(0))
    worth = total * heads * width // _GRAIN
    scaled = int(np.float64(scale).view(np.int64))
    spread(_kernel, *(tensor.data_ptr() for tensor in at), *sizes, scaled, worth=worth, alive=at)


@numba.njit(fastmath=_MATHS)
def _exp(x: _Array, count: int, bits: _Integers, powers: _Array) -> None:
    """x[i] = exp(x[i]) for x up to 0, to 2 units in the last place: 2^n times a polynomial of the rest.

    `bits` and `powers` are the same memory, as integers and as numbers.
    """
    for i in range(count):
        if x[i] < _LOWEST:
            x[i] = _LOWEST
    for i in range(count):
        n = np.int32(x[i] * np.float32(1.442695041) - np.float32(0.5))
        bits[i] = (n + np.int32(127)) << np.int32(23)
        r = x[i] - np.float32(n) * np.float32(0.693359375) + np.float32(n) * np.float32(2.12194440e-4)
        p = np.float32(1.9875691500e-4)
        p = p * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        x[i] = p * r * r + r + np.float32(1)
    for i in range(count):
        x[i] *= powers[i]


@numba.njit(fastmath=_MATHS)
def _four_scores(q: _Array, a: _Array, b: _Array, c: _Array, d: _Array, scale: np.float32, found: _Array) -> None:
    """found[i] = scale · Σ q[.] k_i[.] for four keys."""
    s0 = s1 = s2 = s3 = np.float32(0)
    for i in range(q.shape[0]):
        v = q[i]
        s0 += v * a[i]
        s1 += v * b[i]
        s2 += v * c[i]
        s3 += v * d[i]
    found[0], found[1], found[2], found[3] = s0 * scale, s1 * scale, s2 * scale, s3 * scale


@numba.njit(fastmath=_MATHS)
def _add_four(y: _Array, a: _Array, b: _Array, c: _Array, d: _Array, share: _Array) -> None:
    """y += Σ share[i] v_i for four values."""
    s0, s1, s2, s3 = share[0], share[1], share[2], share[3]
    for i in range(y.shape[0]):
        y[i] += s0 * a[i] + s1 * b[i] + s2 * c[i] + s3 * d[i]


@numba.njit
def _four_rows(table: int, index: Any, t: int, stride: int, shared: int, width: int) -> tuple[_Array, ...]:
    """The rows index[t] to index[t + 3] of a table, each [K, D]; the last one instead of those that do not exist."""
    last = len(index) - 1
    return (
        numba.carray(pointer(table + 4 * stride * index[t]), (shared, width), np.float32),
        numba.carray(pointer(table + 4 * stride * index[min(t + 1, last)]), (shared, width), np.float32),
        numba.carray(pointer(table + 4 * stride * index[min(t + 2, last)]), (shared, width), np.float32),
        numba.carray(pointer(table + 4 * stride * index[min(t + 3, last)]), (shared, width), np.float32),
    )


def _walk(
    out_at: int, query_at: int, keys_at: int, values_at: int, index_at: int, spans_at: int,
    rows: int, heads: int, shared: int, width: int, q_token: int, q_head: int, k_row: int, v_row: int, scaled: int,
    share: int, shares: int,
) -> bool:  # fmt: skip
    """One of `shares` equal shares of the requests. Addresses and sizes are those in `run`."""
    spans = numba.carray(pointer(spans_at), (rows, 3), np.int64)
    bits = np.empty(_BLOCK, np.int32)
    powers = bits.view(np.float32)
    one = np.empty(1, np.int64)
    one[0] = scaled
    scale = np.float32(one.view(np.float64)[0])
    scores = np.empty((heads, _BLOCK), np.float32)
    most = np.empty(heads, np.float32)
    total = np.empty(heads, np.float32)
    for row in range(rows * share // shares, rows * (share + 1) // shares):
        token, first, count = spans[row]
        index = numba.carray(pointer(index_at + 8 * first), (count,), np.int64)
        out = numba.carray(pointer(out_at + 4 * token * heads * width), (heads, width), np.float32)
        out[:] = 0
        for begin in range(0, count, _BLOCK):
            size = min(_BLOCK, count - begin)
            for t in range(0, size, 4):
                a, b, c, d = _four_rows(keys_at, index[begin : begin + size], t, k_row, shared, width)
                for h in range(heads):
                    j = h * shared // heads
                    q = numba.carray(pointer(query_at + 4 * (token * q_token + h * q_head)), (width,), np.float32)
                    _four_scores(q, a[j], b[j], c[j], d[j], scale, scores[h, t:])
            for h in range(heads):
                s = scores[h]
                top = s[0] if begin == 0 else most[h]
                for t in range(size):
                    top = s[t] if s[t] > top else top
                if begin == 0:
                    total[h] = 0
                elif top > most[h]:
                    fall = np.exp(most[h] - top)
                    total[h] *= fall
                    for i in range(width):
                        out[h, i] *= fall
                most[h] = top
                for t in range(size):
                    s[t] -= top
                _exp(s, size, bits, powers)
                added = np.float32(0)
                for t in range(size):
                    added += s[t]
                total[h] += added
                s[size : (size + 3) // 4 * 4] = 0  # of the last row, which is read again in the place of missing ones
            for t in range(0, size, 4):
                a, b, c, d = _four_rows(values_at, index[begin : begin + size], t, v_row, shared, width)
                for h in range(heads):
                    j = h * shared // heads
                    _add_four(out[h], a[j], b[j], c[j], d[j], scores[h, t:])
        for h in range(heads):
            for i in range(width):
                out[h, i] /= total[h]
    return True


_kernel = compile_kernel(_walk, fastmath=_MATHS)
