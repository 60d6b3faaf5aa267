"""`kernels/grouped_op.py` on a GPU, in Triton: the products of all groups in one kernel, whatever rows they have.

A tile of rows belongs to one group. Each program finds its group from the running sums of the groups' tiles, so the
numbers of rows never leave the device. The same kernel computes y and the gradient of x, with each matrix transposed
and A and B exchanged. The gradients of A and B are sums over the rows of a group, in a second kernel.

The kernels are tested in Triton's interpreter on a CPU, and have not run on a GPU.

Shapes: S rows, E groups, O out_features, I in_features, F groups with factors, R their rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, DEPTH = 32, 64, 32
"""Rows and columns of a tile of the output, and the entries of a row of x that are read at a time. Not tuned."""


def grouped(
    x: Tensor, ends: Tensor, weight: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], scales: Sequence[float],
    groups: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [S, O] and x Aᵀ [S, R]."""
    down, up = _stacked(A, x.dtype), _stacked(B, x.dtype)
    return _run(x, ends, weight, down, up, scales, groups)


def grouped_grad(
    g: Tensor, x: Tensor, low: Tensor, ends: Tensor, weight: Tensor, A: Sequence[Tensor], B: Sequence[Tensor],
    scales: Sequence[float], groups: Sequence[int],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """The gradients of x [S, I], and of each A [R, I] and B [O, R]."""
    g = g.contiguous()
    down, up = _stacked(A, g.dtype), _stacked(B, g.dtype)
    turned = [None if factor is None else factor.transpose(1, 2) for factor in (up, down)]
    g_x, back = _run(g, ends, weight.transpose(1, 2), turned[0], turned[1], scales, groups)  # back = g B [S, R]
    g_A = _outer(back, x.contiguous(), ends, scales, groups)  # [F, R, I]
    g_B = _outer(low, g, ends, scales, groups)  # [F, R, O]
    return (
        g_x,
        [own.to(a.dtype, copy=True) for own, a in zip(g_A, A, strict=True)],
        [own.t().to(b.dtype, copy=True, memory_format=torch.contiguous_format) for own, b in zip(g_B, B, strict=True)],
    )


def _stacked(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
    return torch.stack([factor.to(dtype) for factor in factors]) if factors else None


def _run(
    x: Tensor, ends: Tensor, weight: Tensor, down: Tensor | None, up: Tensor | None, scales: Sequence[float],
    groups: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x W_eᵀ + s (x downᵀ) upᵀ [S, O], and x downᵀ [S, R]. Rows after the last end are zero."""
    x, (count, outputs, inputs) = x.contiguous(), weight.shape
    rank = 0 if down is None else down.shape[1]
    y, low = x.new_zeros(len(x), outputs), x.new_zeros(len(x), rank)
    ends = ends.to(torch.int64)
    sizes = torch.diff(ends, prepend=ends.new_zeros(1))
    tiles = ((sizes + ROWS - 1) // ROWS).cumsum(0)
    places = torch.full((count,), -1, dtype=torch.int64, device=x.device)
    if groups:
        places[torch.tensor(groups, device=x.device)] = torch.arange(len(groups), device=x.device)
    factors = torch.tensor(list(scales) or [0.0], dtype=torch.float32, device=x.device)
    a, b = (x, x) if down is None or up is None else (down.contiguous(), up.contiguous())
    grid = (triton.cdiv(len(x), ROWS) + count, triton.cdiv(outputs, COLUMNS))
    with torch.cuda.device_of(x):
        _product[grid](
            y, low, x, ends, tiles, weight, a, b, places, factors, count, outputs, inputs, *weight.stride(),
            RANK=rank, PADDED=max(16, triton.next_power_of_2(max(rank, 1))), GROUPS=triton.next_power_of_2(count),
            ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH,
        )  # fmt: skip
    return y, low


def _outer(u: Tensor, v: Tensor, ends: Tensor, scales: Sequence[float], groups: Sequence[int]) -> Tensor:
    """The sums of s uᵀ v over the rows of these groups: u [S, R], v [S, C] -> [F, R, C] in float32."""
    rank, width = u.shape[1], v.shape[1]
    out = torch.empty(len(groups), rank, width, dtype=torch.float32, device=u.device)
    if groups and rank:
        numbers = torch.tensor(groups, dtype=torch.int64, device=u.device)
        factors = torch.tensor(list(scales), dtype=torch.float32, device=u.device)
        with torch.cuda.device_of(u):
            _sums[(len(groups), triton.cdiv(width, COLUMNS))](
                out, u.contiguous(), v, ends.to(torch.int64), numbers, factors, width,
                RANK=rank, PADDED=max(16, triton.next_power_of_2(rank)), ROWS=ROWS, COLUMNS=COLUMNS,
            )  # fmt: skip
    return out


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    y, low, x, ends, tiles, w, a, b, places, scales, count, outputs, inputs, w_group, w_out, w_in,
    RANK: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one group, and some of its columns."""
    tile = tl.program_id(0)
    number = tl.arange(0, GROUPS)
    until = tl.load(tiles + number, mask=number < count, other=1 << 40)
    group = tl.sum((until <= tile).to(tl.int32), axis=0)
    if group < count:
        before = tl.load(tiles + group - 1, mask=group > 0, other=0)
        first = tl.load(ends + group - 1, mask=group > 0, other=0)
        row = first + (tile - before) * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = row < tl.load(ends + group)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        place = tl.load(places + group)
        rank = tl.arange(0, PADDED)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        h = tl.zeros([ROWS, PADDED], tl.float32)
        for start in range(0, inputs, DEPTH):
            k = start + tl.arange(0, DEPTH)
            own = tl.load(x + row[:, None] * inputs + k[None, :], mask=inside[:, None] & (k < inputs)[None, :], other=0)
            at = group.to(tl.int64) * w_group + k[:, None] * w_in + column[None, :] * w_out
            part = tl.load(w + at, mask=(k < inputs)[:, None] & (column < outputs)[None, :], other=0)
            total = tl.dot(own, part, total, input_precision="ieee")
            if RANK > 0:
                known = (k < inputs)[:, None] & (rank < RANK)[None, :] & (place >= 0)
                at = place * RANK * inputs + rank[None, :] * inputs + k[:, None]
                h = tl.dot(own, tl.load(a + at, mask=known, other=0), h, input_precision="ieee")
        if RANK > 0:
            scale = tl.load(scales + place, mask=place >= 0, other=0)
            known = (column < outputs)[None, :] & (rank < RANK)[:, None] & (place >= 0)
            at = place * outputs * RANK + column[None, :] * RANK + rank[:, None]
            up = tl.load(b + at, mask=known, other=0)
            total += scale * tl.dot(h.to(up.dtype), up, input_precision="ieee")
            if tl.program_id(1) == 0:
                to = low + row[:, None] * RANK + rank[None, :]
                tl.store(to, h.to(low.dtype.element_ty), mask=inside[:, None] & (rank < RANK)[None, :])
        to = y + row[:, None] * outputs + column[None, :]
        tl.store(to, total.to(y.dtype.element_ty), mask=inside[:, None] & (column < outputs)[None, :])


@triton.jit
def _sums(  # type: ignore[no-untyped-def]
    out, u, v, ends, numbers, scales, width,
    RANK: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some columns of the sum over the rows of one group."""
    place = tl.program_id(0)
    group = tl.load(numbers + place)
    first = tl.load(ends + group - 1, mask=group > 0, other=0)
    stop = tl.load(ends + group)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, PADDED)
    total = tl.zeros([PADDED, COLUMNS], tl.float32)
    for start in range(first, stop, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        inside = row < stop
        left = tl.load(u + row[None, :] * RANK + rank[:, None], mask=inside[None, :] & (rank < RANK)[:, None], other=0)
        right = tl.load(
            v + row[:, None] * width + column[None, :], mask=inside[:, None] & (column < width)[None, :], other=0
        )
        total = tl.dot(left, right, total, input_precision="ieee")
    total *= tl.load(scales + place)
    to = out + place.to(tl.int64) * RANK * width + rank[:, None] * width + column[None, :]
    tl.store(to, total, mask=(rank < RANK)[:, None] & (column < width)[None, :])
