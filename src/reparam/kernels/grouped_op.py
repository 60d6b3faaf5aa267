"""`kernels/grouped.py`'s product as an op: the numbers of rows of the groups are a tensor, so that graphs compile.

    reparam::grouped       x, ends -> y, and the products x Aᵀ, which backward needs
    reparam::grouped_grad  the gradients of x, A and B

The factors of a group without rows get a gradient of zero, where `grouped_linear` gives them none: the tensors that a
compiled graph returns do not depend on the data. On a GPU both ops run Triton kernels if all factors have one rank.

Shapes: S rows sorted by group, E groups, O out_features, I in_features, R the largest rank.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reparam.kernels.grouped import Group, Low, backward, forward

_NAME, _GRAD = "reparam::grouped", "reparam::grouped_grad"
_FACTORS = "Tensor[] A, Tensor[] B, float[] scales, int[] groups"
_TAG = torch.Tag.pt2_compliant_tag
torch.library.define(_NAME, f"(Tensor x, Tensor ends, Tensor weight, {_FACTORS}) -> (Tensor, Tensor)", tags=_TAG)
torch.library.define(
    _GRAD,
    f"(Tensor g, Tensor x, Tensor low, Tensor ends, Tensor weight, {_FACTORS}) -> (Tensor, Tensor[], Tensor[])",
    tags=_TAG,
)


def grouped(
    x: Tensor, ends: Tensor, weight: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], scales: Sequence[float],
    groups: Sequence[int],
) -> Tensor:  # fmt: skip
    """x [S, I] -> y [S, O] = x W_eᵀ + s (x Aᵀ) Bᵀ, differentiable in x, A and B. Rows after the last end are zero.

    Args:
        x: rows sorted by group, in the dtype of `weight`.
        ends: integers [E]: the rows of group e are before ends[e].
        weight: W [E, O, I], frozen.
        A: factors [R, I] of some groups, in any dtype.
        B: factors [O, R] of the same groups.
        scales: s of each of them.
        groups: the number of the group of each of them, in ascending order.

    >>> x, W = torch.ones(2, 3), torch.ones(2, 1, 3)
    >>> grouped(x, torch.tensor([1, 2]), W, [torch.ones(1, 3)], [torch.ones(1, 1)], [2.0], [1])
    tensor([[3.],
            [9.]])
    """
    found: Tensor = torch.ops.reparam.grouped.default(
        x, ends, weight, list(A), list(B), [float(scale) for scale in scales], list(groups)
    )[0]
    return found


@torch.library.impl(_NAME, "CompositeExplicitAutograd")
def _grouped(
    x: Tensor, ends: Tensor, weight: Tensor, A: list[Tensor], B: list[Tensor], scales: list[float], groups: list[int]
) -> tuple[Tensor, Tensor]:
    kernels = _kernels(x, A)
    if kernels is not None:
        return kernels.grouped(x, ends, weight, A, B, scales, groups)
    low, kept = x.new_zeros(len(x), _rank(A)), list[Tensor]()
    found = _groups(ends, weight, A, B, scales, groups)[0]
    y = forward(x, found, weight.shape[1], kept)
    for own, h in zip((own for group in found for own in group.lows), kept, strict=True):
        low[own.start : own.stop, : h.shape[1]] = h
    return y, low


@torch.library.impl(_GRAD, "CompositeExplicitAutograd")
def _grouped_grad(
    g: Tensor, x: Tensor, low: Tensor, ends: Tensor, weight: Tensor, A: list[Tensor], B: list[Tensor],
    scales: list[float], groups: list[int],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    kernels = _kernels(x, A)
    if kernels is not None:
        return kernels.grouped_grad(g, x, low, ends, weight, A, B, scales, groups)
    found, numbers = _groups(ends, weight, A, B, scales, groups)
    kept = [low[own.start : own.stop, : len(own.A)] for group in found for own in group.lows]
    g_x, parts = backward(g, x, found, kept, x.shape[1], [True] * (1 + 2 * len(kept)))
    assert g_x is not None
    g_A, g_B = [torch.zeros_like(a) for a in A], [torch.zeros_like(b) for b in B]
    for number, own_A, own_B in zip(numbers, parts[::2], parts[1::2], strict=True):
        assert own_A is not None
        assert own_B is not None
        g_A[number].copy_(own_A)
        g_B[number].copy_(own_B)
    return g_x, g_A, g_B


@torch.library.register_fake(_NAME)
def _grouped_fake(
    x: Tensor, ends: Tensor, weight: Tensor, A: list[Tensor], B: list[Tensor], scales: list[float], groups: list[int]
) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), weight.shape[1]), x.new_empty(len(x), _rank(A))


@torch.library.register_fake(_GRAD)
def _grouped_grad_fake(
    g: Tensor, x: Tensor, low: Tensor, ends: Tensor, weight: Tensor, A: list[Tensor], B: list[Tensor],
    scales: list[float], groups: list[int],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    return x.new_empty(x.shape), [torch.empty_like(a) for a in A], [torch.empty_like(b) for b in B]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ends, weight, A, B, ctx.scales, ctx.groups = inputs
    ctx.count = len(A)
    ctx.set_materialize_grads(True)
    ctx.save_for_backward(x, output[1], ends, weight, *A, *B)


def _differentiate(ctx: Any, g: Tensor, _: Tensor) -> tuple[Any, ...]:
    x, low, ends, weight, *factors = ctx.saved_tensors
    A, B = factors[: ctx.count], factors[ctx.count :]
    g_x, g_A, g_B = torch.ops.reparam.grouped_grad.default(
        g, x, low, ends, weight, A, B, list(ctx.scales), list(ctx.groups)
    )
    return g_x, None, None, list(g_A), list(g_B), None, None


torch.library.register_autograd(_NAME, _differentiate, setup_context=_keep)


def _rank(A: Sequence[Tensor]) -> int:
    return max([len(a) for a in A], default=0)


def _groups(
    ends: Tensor, weight: Tensor, A: list[Tensor], B: list[Tensor], scales: list[float], groups: list[int]
) -> tuple[list[Group], list[int]]:
    """The groups that have rows, and the places of their factors in `A`."""
    found, used, start = list[Group](), list[int](), 0
    places = {number: place for place, number in enumerate(groups)}
    for number, stop in enumerate(ends.tolist()):
        if stop > start:
            lows = []
            if number in places:
                place = places[number]
                lows.append(Low(start, stop, A[place], B[place], scales[place]))
                used.append(place)
            found.append(Group(start, stop, weight[number], lows))
            start = stop
    return found, used


def _kernels(x: Tensor, A: Sequence[Tensor]) -> Any | None:
    """The module of Triton kernels, if it can compute with these tensors."""
    if x.device.type != "cuda" or x.dtype == torch.float64 or len({len(a) for a in A}) > 1:
        return None
    return _triton()


@functools.cache
def _triton() -> Any | None:
    try:
        from reparam.kernels import grouped_gpu
    except ImportError:
        return None
    return grouped_gpu
