"""Products of groups of rows with matrices of their own: the experts of a Mixture-of-Experts model.

The rows are sorted by group. Each group e has a frozen matrix W_e. Some of its rows can have factors A and B:

    y[rows of e] = x[rows of e] W_eᵀ + s (x[rows of e] Aᵀ) Bᵀ

`grouped_linear` is called with the groups that have rows, which the caller reads from the device. `grouped_op.py` has
the same product as an op for compiled graphs, in which the numbers of rows are a tensor.

Shapes: S rows in all, O out_features, I in_features, R rank.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reparam.kernels.frozen import pieces

Writer = Callable[[Tensor, int], object]
"""f(out [rows, I], start): writes the rows W[start : start + rows] into `out`, in its dtype."""


class Low(NamedTuple):
    """Factors A [R, I] and B [O, R] of some rows, and the scale s."""

    start: int
    stop: int
    A: Tensor
    B: Tensor
    scale: float


class Group(NamedTuple):
    """The rows of one group, its frozen matrix, and the factors of parts of its rows."""

    start: int
    stop: int
    weight: Tensor | Writer | None  # [O, I]; None for zero
    lows: Sequence[Low] = ()


def grouped_linear(x: Tensor, groups: Sequence[Group], width: int) -> Tensor:
    """x [S, I], rows sorted by group -> y [S, O = width], differentiable in x and the factors. Other rows are zero.

    A quantized matrix is unpacked in pieces that stay in the cache, into the same memory for all groups.

    >>> low = Low(0, 2, torch.ones(1, 3), torch.ones(1, 1), 2.0)
    >>> grouped_linear(torch.ones(2, 3), [Group(0, 2, torch.ones(1, 3), [low])], 1)
    tensor([[9.],
            [9.]])
    """
    if not torch.is_grad_enabled():
        return forward(x, groups, width, None)
    factors = [factor for group in groups for low in group.lows for factor in low[2:4]]
    found: Tensor = _Grouped.apply(x, list(groups), width, *factors)
    return found


def forward(x: Tensor, groups: Sequence[Group], width: int, kept: list[Tensor] | None) -> Tensor:
    """y [S, width]. The products x Aᵀ [rows, R] are added to `kept`."""
    y, dtype = _empty(x, groups, width), x.dtype
    for start, stop, weight, lows in groups:
        if weight is not None:
            _multiply(x[start:stop], weight, y[start:stop])
        for first, last, A, B, scale in lows:
            if A.dtype is not dtype or B.dtype is not dtype:
                A, B = A.to(dtype), B.to(dtype)
            h = torch.mm(x[first:last], A.t())
            y[first:last].addmm_(h, B.t(), alpha=scale)
            if kept is not None:
                kept.append(h)
    return y


def backward(
    g: Tensor, x: Tensor | None, groups: Sequence[Group], kept: Sequence[Tensor], width: int, needs: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of x [S, width], and of A and B of each `Low`. `needs` tells which of them are wanted."""
    g = g.contiguous()
    g_x = _empty(g, groups, width) if needs[0] else None
    wanted, low = iter(needs[1:]), iter(kept)
    found: list[Tensor | None] = []
    for start, stop, weight, lows in groups:
        if g_x is not None and weight is not None:
            _multiply_turned(g[start:stop], weight, g_x[start:stop])
        for first, last, A, B, scale in lows:
            A, B, own, h = A.to(g.dtype), B.to(g.dtype), g[first:last], next(low, None)
            g_h = (own @ B).mul_(scale)
            if g_x is not None:
                g_x[first:last].addmm_(g_h, A)
            found.append(g_h.t() @ x[first:last] if next(wanted) and x is not None else None)
            found.append((own.t() @ h).mul_(scale) if next(wanted) and h is not None else None)
    return g_x, found


class _Grouped(torch.autograd.Function):
    """`grouped_linear` as one node of the graph. The matrices are frozen, so backward needs x only for A's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: list[Group], width: int, *factors: Tensor) -> Tensor:
        kept: list[Tensor] = []
        y = forward(x, groups, width, kept)
        trains = any(ctx.needs_input_grad[3:])
        ctx.plain = [group._replace(lows=()) for group in groups]
        ctx.spans = [[(low.start, low.stop, low.scale) for low in group.lows] for group in groups]
        ctx.width, ctx.count = x.shape[1], len(factors)
        ctx.save_for_backward(x if trains else None, *factors, *(kept if trains else ()))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        parts = iter(saved[: ctx.count])
        groups = [
            group._replace(lows=[Low(first, last, next(parts), next(parts), scale) for first, last, scale in spans])
            for group, spans in zip(ctx.plain, ctx.spans, strict=True)
        ]
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]]
        g_x, found = backward(g, x, groups, saved[ctx.count :], ctx.width, needs)
        return g_x, None, None, *found


def _multiply(x: Tensor, weight: Tensor | Writer, out: Tensor) -> None:
    """out = x Wᵀ."""
    if isinstance(weight, Tensor):
        torch.mm(x, weight.t(), out=out)
        return
    for first, last, W in _unpacked(weight, (out.shape[1], x.shape[1]), x):
        torch.mm(x, W.t(), out=out[:, first:last])


def _multiply_turned(g: Tensor, weight: Tensor | Writer, out: Tensor) -> None:
    """out = g W. Several pieces are summed in float32 or wider, because each sum rounds."""
    if isinstance(weight, Tensor):
        torch.mm(g, weight, out=out)
        return
    total: Tensor | None = None
    for first, last, W in _unpacked(weight, (g.shape[1], out.shape[1]), g):
        if last - first == g.shape[1]:
            torch.mm(g, W, out=out)
            return
        part = g[:, first:last]
        if total is None:
            total = out.zero_() if out.dtype in (torch.float32, torch.float64) else out.new_zeros(out.shape).float()
        if total.dtype == part.dtype:
            total.addmm_(part, W)
        else:
            total += part @ W
    if total is not None and total is not out:
        out.copy_(total)


def _unpacked(write: Writer, shape: tuple[int, int], like: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """The pieces of W [O, I] as (first row, the one after the last, W[rows]), all in the same memory."""
    for first, last in pieces(shape, like.device):
        W = _scratch((last - first) * shape[1], like).view(last - first, shape[1])
        write(W, first)
        yield first, last, W


_kept = threading.local()


def _scratch(count: int, like: Tensor) -> Tensor:
    """Memory [count] for a piece of a matrix. On a CPU each thread keeps that of its largest piece, about 4 MiB.

    New memory would cost as much as the product, because the system clears it page by page.
    """
    if like.device.type != "cpu":
        return like.new_empty(count)
    found: Tensor | None = getattr(_kept, "memory", None)
    if found is None or found.dtype is not like.dtype or found.numel() < count:
        with torch.inference_mode(False):  # so that it can be written both in inference mode and outside of it
            found = _kept.memory = torch.empty(count, dtype=like.dtype)
    return found[:count]


def _empty(like: Tensor, groups: Sequence[Group], width: int) -> Tensor:
    """A new tensor [S, width], which the groups fill; zero if they do not write all of it."""
    covered = sum(group.stop - group.start for group in groups if group.weight is not None) == len(like)
    return like.new_empty(len(like), width) if covered else like.new_zeros(len(like), width)
