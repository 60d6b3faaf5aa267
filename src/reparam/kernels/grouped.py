"""Products of groups of rows with matrices of their own: the experts of a Mixture-of-Experts model.

The rows are sorted by group. Each group e has a frozen matrix W_e and, where an update is active, factors A_e and B_e:

    y[rows of e] = x[rows of e] W_eᵀ + s_e (x[rows of e] A_eᵀ) B_eᵀ

Shapes: S rows in all, O out_features, I in_features, R rank of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Group(NamedTuple):
    """The rows of one group, its frozen matrix, and its factors."""

    start: int
    stop: int
    weight: Tensor | None  # [O, I]; None for zero
    factors: tuple[Tensor, Tensor, float] | None  # A [R, I], B [O, R], s


def grouped_linear(x: Tensor, groups: Sequence[Group], width: int) -> Tensor:
    """x [S, I], rows sorted by group -> y [S, O = width], differentiable in x and the factors. Other rows are zero.

    The factors of groups without rows are not touched: they get no gradient.

    >>> one = Group(0, 2, torch.ones(1, 3), (torch.ones(1, 3), torch.ones(1, 1), 2.0))
    >>> grouped_linear(torch.ones(2, 3), [one], 1)
    tensor([[9.],
            [9.]])
    """
    factors = [f for group in groups if group.factors is not None for f in group.factors[:2]]
    found: Tensor = _Grouped.apply(x, list(groups), width, *factors)
    return found


class _Grouped(torch.autograd.Function):
    """`grouped_linear` as one node of the graph. The matrices are frozen, so backward needs x only for A's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: list[Group], width: int, *factors: Tensor) -> Tensor:
        y = _empty(x, groups, width)
        parts, low = iter(factors), []
        for start, stop, weight, own in groups:
            rows, out = x[start:stop], y[start:stop]
            if weight is not None:
                torch.mm(rows, weight.t(), out=out)
            if own is not None:
                A, B = next(parts).to(x.dtype), next(parts).to(x.dtype)
                low.append(rows @ A.t())
                out.addmm_(low[-1], B.t(), alpha=own[2])
        trains = any(ctx.needs_input_grad[3:])
        ctx.groups = [(*group[:3], None if group.factors is None else group.factors[2]) for group in groups]
        ctx.plain = [group._replace(factors=None) for group in groups]
        ctx.shape, ctx.count = x.shape, len(factors)
        ctx.save_for_backward(x if trains else None, *factors, *(low if trains else ()))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        parts, low = iter(saved[: ctx.count]), iter(saved[ctx.count :])
        needs, place = ctx.needs_input_grad, 3
        g_x = _empty(g, ctx.plain, ctx.shape[1]) if needs[0] else None
        found: list[Tensor | None] = []
        for start, stop, weight, scale in ctx.groups:
            g_y, out = g[start:stop], None if g_x is None else g_x[start:stop]
            if out is not None and weight is not None:
                torch.mm(g_y, weight, out=out)
            if scale is None:
                continue
            A, B = next(parts).to(g.dtype), next(parts).to(g.dtype)
            g_h = scale * (g_y @ B)
            if out is not None:
                out.addmm_(g_h, A)
            h = None if x is None else next(low)
            found.append(g_h.t() @ x[start:stop] if needs[place] else None)
            found.append(scale * (g_y.t() @ h) if h is not None and needs[place + 1] else None)
            place += 2
        return g_x, None, None, *found


def _empty(like: Tensor, groups: Sequence[Group], width: int) -> Tensor:
    """A new tensor [S, width], which the groups fill; zero if they do not write all of it."""
    covered = sum(group.stop - group.start for group in groups if group.weight is not None) == len(like)
    return like.new_empty(len(like), width) if covered else like.new_zeros(len(like), width)
