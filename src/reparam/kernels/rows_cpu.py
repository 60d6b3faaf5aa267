"""The mixed-batch op for contiguous float32 on a CPU, compiled by numba. Its reference is `rows.update_by_slot_`.

Factors are read in place, and those of each used slot once, so the time for one token per row is that of reading them.
Two orders make this a stream that the hardware prefetches: rows are processed by slot (batch order is 1.2 to 1.9 times
slower from memory), and factor rows one at a time (four at a time is 1.4 times slower). With four or more tokens
arithmetic dominates: tiles of 4 tokens x 4 ranks keep 16 sums in registers.

Shapes as in `rows`; loop indices i and o run over I and O.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from torch import Tensor

from reparam.kernels.packs import Step, Tables
from reparam.kernels.threads import compile_kernel, pointer, spread

_UNIT = 32
"""Tokens of a row in one unit of work, which a single thread processes."""
_GRAIN = 1 << 20
"""Multiply-adds that justify a thread: 70 us from cache, 300 us from memory; handing work to a thread costs 40 us."""
_MATHS = {"reassoc", "contract", "nsz"}  # needed to vectorize sums; NaN and infinity still propagate
_Array = np.ndarray[Any, np.dtype[np.float32]]
_Integers = np.ndarray[Any, np.dtype[np.int64]]


def run(
    y: Tensor, x: Tensor, slots: Tensor, A: Tensor, B_t: Tensor, spans: Tensor, most: int, gain: Tensor | None = None
) -> bool:
    """Like `rows.bank_update_`, for contiguous tensors. False, with `y` unchanged, if a slot or span is invalid."""
    rows, tokens, outputs = y.shape
    downs, inputs = A.shape
    scale, gains = (0, 0) if gain is None else (gain.data_ptr(), gain.shape[0])
    at = (y.data_ptr(), x.data_ptr(), 0, slots.data_ptr(), A.data_ptr(), B_t.data_ptr(), spans.data_ptr(), scale)
    sizes = (rows, tokens, inputs, outputs, spans.shape[0], downs, B_t.shape[0], gains, most)
    worth = rows * tokens * most * (inputs + outputs) // _GRAIN
    return spread(_kernel, *at, *sizes, worth=worth, alive=(y, x, slots, A, B_t, spans, gain))


def run_packed(y: Tensor, x: Tensor, step: Step, tables: Tables, most: int) -> bool:
    """Like `run` for y [N, O] and x [N, I], where row r has the tokens from begins[r] to begins[r + 1]."""
    numbers = (y.data_ptr(), x.data_ptr(), *step.addresses, *tables.addresses, *step.sizes, *tables.sizes, most)
    worth = step.total * most * sum(tables.widths) // _GRAIN
    return spread(_kernel, *numbers, worth=worth, alive=(y, x, step, tables))


@numba.njit(fastmath=_MATHS)
def _down_one(x: _Array, A: _Array, rank: int, h: _Array) -> None:
    """h[r] = Σ_i x[i] A[r, i] for r below `rank`."""
    for r in range(rank):
        a = A[r]
        total = np.float32(0)
        for i in range(x.shape[0]):
            total += x[i] * a[i]
        h[r] = total


@numba.njit(fastmath=_MATHS)
def _up_one(y: _Array, B_t: _Array, rank: int, h: _Array) -> None:
    """y[o] += Σ_r h[r] B_t[r, o]."""
    for r in range(rank):
        b = B_t[r]
        part = h[r]
        for o in range(y.shape[0]):
            y[o] += part * b[o]


@numba.njit(fastmath=_MATHS)
def _down_tile(x: _Array, A: _Array, r: int, h: _Array) -> None:
    """h[t, k] = Σ_i x[t, i] A[r + k, i] for 4 tokens and 4 ranks."""
    x0, x1, x2, x3 = x[0], x[1], x[2], x[3]
    a0, a1, a2, a3 = A[r], A[r + 1], A[r + 2], A[r + 3]
    h00 = h01 = h02 = h03 = h10 = h11 = h12 = h13 = np.float32(0)
    h20 = h21 = h22 = h23 = h30 = h31 = h32 = h33 = np.float32(0)
    for i in range(x0.shape[0]):
        p, q, u, v = a0[i], a1[i], a2[i], a3[i]
        h00 += x0[i] * p
        h01 += x0[i] * q
        h02 += x0[i] * u
        h03 += x0[i] * v
        h10 += x1[i] * p
        h11 += x1[i] * q
        h12 += x1[i] * u
        h13 += x1[i] * v
        h20 += x2[i] * p
        h21 += x2[i] * q
        h22 += x2[i] * u
        h23 += x2[i] * v
        h30 += x3[i] * p
        h31 += x3[i] * q
        h32 += x3[i] * u
        h33 += x3[i] * v
    h[0, 0], h[0, 1], h[0, 2], h[0, 3] = h00, h01, h02, h03
    h[1, 0], h[1, 1], h[1, 2], h[1, 3] = h10, h11, h12, h13
    h[2, 0], h[2, 1], h[2, 2], h[2, 3] = h20, h21, h22, h23
    h[3, 0], h[3, 1], h[3, 2], h[3, 3] = h30, h31, h32, h33


@numba.njit(fastmath=_MATHS)
def _up_tile(y: _Array, B_t: _Array, r: int, h: _Array) -> None:
    """y[t, o] += Σ_k h[t, k] B_t[r + k, o] for 4 tokens and 4 ranks."""
    y0, y1, y2, y3 = y[0], y[1], y[2], y[3]
    b0, b1, b2, b3 = B_t[r], B_t[r + 1], B_t[r + 2], B_t[r + 3]
    h00, h01, h02, h03 = h[0, 0], h[0, 1], h[0, 2], h[0, 3]
    h10, h11, h12, h13 = h[1, 0], h[1, 1], h[1, 2], h[1, 3]
    h20, h21, h22, h23 = h[2, 0], h[2, 1], h[2, 2], h[2, 3]
    h30, h31, h32, h33 = h[3, 0], h[3, 1], h[3, 2], h[3, 3]
    for o in range(y0.shape[0]):
        p, q, u, v = b0[o], b1[o], b2[o], b3[o]
        y0[o] += h00 * p + h01 * q + h02 * u + h03 * v
        y1[o] += h10 * p + h11 * q + h12 * u + h13 * v
        y2[o] += h20 * p + h21 * q + h22 * u + h23 * v
        y3[o] += h30 * p + h31 * q + h32 * u + h33 * v


@numba.njit(fastmath=_MATHS)
def _four_tokens(y: _Array, x: _Array, A: _Array, B_t: _Array, rank: int, h: _Array) -> None:
    """Update four tokens of one row: whole tiles of ranks, then the remaining ranks."""
    whole = rank // 4 * 4
    for r in range(0, whole, 4):
        _down_tile(x, A, r, h)
        _up_tile(y, B_t, r, h)
    if whole < rank:
        for t in range(4):
            _down_one(x[t], A[whole:], rank - whole, h[t])
            _up_one(y[t], B_t[whole:], rank - whole, h[t])


@numba.njit
def _by_slot(slots: _Integers, spans: _Integers, downs: int, ups: int, gains: int, most: int) -> tuple[bool, _Integers]:
    """Whether all slots and their spans are valid, and the rows sorted by slot, without those of the base model."""
    count = len(spans)
    first = np.zeros(count + 1, np.int64)  # position of each slot's next row in the order
    for slot in slots:
        if slot < -1 or slot >= count:
            return False, first
        if slot >= 0:
            first[slot + 1] += 1
    for s in range(count):
        a, b, rank, scale = spans[s, 0], spans[s, 1], spans[s, 2], spans[s, 3]
        inside = 0 <= rank <= most and 0 <= a <= downs - rank and 0 <= b <= ups - rank
        if first[s + 1] > 0 and not (inside and -1 <= scale < gains):
            return False, first
    for s in range(count):
        first[s + 1] += first[s]
    order = np.empty(first[count], np.int64)
    for row, slot in enumerate(slots):
        if slot >= 0:
            order[first[slot]] = row
            first[slot] += 1
    return True, order


def _walk(
    y_at: int, x_at: int, begins_at: int, slots_at: int, A_at: int, B_at: int, spans_at: int, gain_at: int,
    rows: int, tokens: int, inputs: int, outputs: int, count: int, downs: int, ups: int, gains: int, most: int,
    share: int, shares: int,
) -> bool:  # fmt: skip
    """One of `shares` equal shares of the update. Addresses and sizes are those in `run`; `gain_at` 0 means no gain.

    `begins_at` 0 means that each row has `tokens` tokens.
    """
    slots = numba.carray(pointer(slots_at), (rows,), np.int64)
    spans = numba.carray(pointer(spans_at), (count, 4), np.int64)
    good, order = _by_slot(slots, spans, downs, ups, gains, most)
    if not good:
        return False
    begins = numba.carray(pointer(begins_at), (rows + 1,), np.int64)
    total = begins[rows] if begins_at else rows * tokens
    y = numba.carray(pointer(y_at), (total, outputs), np.float32)
    x = numba.carray(pointer(x_at), (total, inputs), np.float32)
    downward = numba.carray(pointer(A_at), (downs, inputs), np.float32)
    upward = numba.carray(pointer(B_at), (ups, outputs), np.float32)
    gain = numba.carray(pointer(gain_at), (gains, outputs), np.float32)
    h = np.empty((4, max(4, most)), np.float32)
    units = 0
    for row in order:
        length = begins[row + 1] - begins[row] if begins_at else tokens
        units += (length + _UNIT - 1) // _UNIT
    unit = 0
    for row in order:
        s = slots[row]
        rank, scale = spans[s, 2], spans[s, 3]
        A, B_t = downward[spans[s, 0] :], upward[spans[s, 1] :]
        start = begins[row] if begins_at else row * tokens
        end = begins[row + 1] if begins_at else start + tokens
        for t in range(start, end, _UNIT):
            if units * share // shares <= unit < units * (share + 1) // shares:
                stop = min(t + _UNIT, end)
                if gain_at and scale >= 0:
                    for k in range(t, stop):
                        y[k] *= gain[scale]
                while t + 4 <= stop:
                    _four_tokens(y[t : t + 4], x[t : t + 4], A, B_t, rank, h)
                    t += 4
                while t < stop:
                    _down_one(x[t], A, rank, h[0])
                    _up_one(y[t], B_t, rank, h[0])
                    t += 1
            unit += 1
    return True


_kernel = compile_kernel(_walk, fastmath=_MATHS)
