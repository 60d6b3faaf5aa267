"""A frozen linear map as one op: y = x Wᵀ + b. W is unpacked piece by piece, and no activation is saved for backward.

`frozen_linear` registers two ops for a storage, `reparam::<name>_linear` and `reparam::<name>_linear_grad`, given one
function that unpacks W. W is frozen, so the gradient of x depends only on g and W: backward saves neither x nor the
unpacked W, only references to the packed tensors. `torch.compile` sees one op.

Shapes: O out_features, I in_features; x [..., I], g and y [..., O].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from reparam.core.dtypes import compute_dtype

Unpack = Callable[..., Tensor]
Product = Callable[..., Tensor | None]


_PIECE = 1 << 20
"""Entries of W unpacked at a time on a CPU: 4 MiB in float32, which stay in the cache until the product reads them.

Unpacking all of W at once takes ten times as long for one token, because of page faults in newly allocated memory."""


def frozen_linear(name: str, packed: str, unpack: Unpack, product: Product | None = None) -> Callable[..., Tensor]:
    """Register the ops of a storage, and return the function that calls them.

    Args:
        name: the name of the storage.
        packed: the types and names of its tensors and numbers in the syntax of an op's schema, such as
            "Tensor codes, Tensor? offset, int block".
        unpack: f(*packed, shape, start, stop, dtype) -> W[start:stop] in that dtype, with shape = [O, I].
        product: a fused kernel f(x, *packed, shape) -> x Wᵀ for x [N, I], which may return None to use `unpack`.

    Returns:
        f(x, packed, shape, bias): x Wᵀ + bias in the dtype of x, or in autocast's; differentiable in x and bias.

    >>> half = frozen_linear("doc_half", "Tensor w", lambda w, shape, start, stop, dtype: w[start:stop].to(dtype))
    >>> half(torch.ones(1, 2), (torch.ones(3, 2, dtype=torch.half),), (3, 2), None)
    tensor([[2., 2., 2.]])
    """
    count = packed.count(",") + 1
    forward_name, backward_name = f"reparam::{name}_linear", f"reparam::{name}_linear_grad"
    tags = torch.Tag.pt2_compliant_tag
    torch.library.define(forward_name, f"(Tensor x, {packed}, int[] shape, Tensor? bias) -> Tensor", tags=tags)
    torch.library.define(backward_name, f"(Tensor g, {packed}, int[] shape) -> Tensor", tags=tags)

    def forward(x: Tensor, *rest: Any) -> Tensor:
        *parts, shape, bias = rest
        if x.shape[-1] != shape[1] or not x.is_floating_point():
            raise ValueError(
                f"{name}: expected floating-point numbers [..., {shape[1]}], got {str(x.dtype)[6:]} {list(x.shape)}"
            )
        flat = x.reshape(-1, shape[1])
        y = product(flat, *parts, shape) if product is not None else None
        if y is None:
            y = x.new_empty(len(flat), shape[0])
            for start, stop in pieces(shape, x.device):
                torch.mm(flat, unpack(*parts, shape, start, stop, x.dtype).t(), out=y[:, start:stop])
        y = y if bias is None else y.add_(bias)
        return _shaped(y, x, shape[0])

    def backward(g: Tensor, *rest: Any) -> Tensor:
        *parts, shape = rest
        flat = g.reshape(-1, shape[0])
        parted = [*pieces(shape, g.device)]
        # Sum several pieces in float32 or wider: a large matrix has hundreds of pieces, and each sum rounds.
        dtype = torch.promote_types(g.dtype, torch.float32) if len(parted) > 1 else g.dtype
        x = g.new_zeros(len(flat), shape[1], dtype=dtype)
        for start, stop in parted:
            part, W = flat[:, start:stop], unpack(*parts, shape, start, stop, g.dtype)
            if dtype == g.dtype:
                x.addmm_(part, W)
            else:
                x += part @ W
        return _shaped(x.to(g.dtype), g, shape[1])

    torch.library.impl(forward_name, "CompositeExplicitAutograd", forward)
    torch.library.impl(backward_name, "CompositeExplicitAutograd", backward)
    torch.library.register_fake(forward_name, lambda x, *rest: x.new_empty(*x.shape[:-1], rest[-2][0]))
    torch.library.register_fake(backward_name, lambda g, *rest: g.new_empty(*g.shape[:-1], rest[-1][1]))
    run = getattr(torch.ops.reparam, f"{name}_linear").default
    run_backward = getattr(torch.ops.reparam, f"{name}_linear_grad").default

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        parts = inputs[1 : 1 + count]
        ctx.save_for_backward(*(part for part in parts if isinstance(part, Tensor)))
        ctx.rest = [None if isinstance(part, Tensor) else part for part in parts]
        ctx.tensors = [isinstance(part, Tensor) for part in parts]
        ctx.shape = inputs[1 + count]

    def differentiate(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[-1]
        g_x = run_backward(g, *_parts(ctx), ctx.shape) if needs_x else None
        return g_x, *[None] * (count + 1), g.reshape(-1, g.shape[-1]).sum(0) if needs_bias else None

    def differentiate_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return run(g, *_parts(ctx), ctx.shape, None), *[None] * (count + 1)

    torch.library.register_autograd(forward_name, differentiate, setup_context=keep)
    torch.library.register_autograd(backward_name, differentiate_backward, setup_context=keep)

    def call(x: Tensor, parts: Sequence[Any], shape: Sequence[int], bias: Tensor | None) -> Tensor:
        dtype = compute_dtype(x)
        bias = bias if bias is None else bias.to(dtype)
        return run(x.to(dtype), *parts, list(shape), bias)

    return call


def _parts(ctx: Any) -> list[Any]:
    """The packed tensors and numbers that the forward saved, in the order of the schema."""
    saved = iter(ctx.saved_tensors)
    return [next(saved) if tensor else part for tensor, part in zip(ctx.tensors, ctx.rest, strict=True)]


def _shaped(flat: Tensor, like: Tensor, last: int) -> Tensor:
    """flat [N, last] with the leading dimensions of `like`. Not a view, which autograd forbids to change."""
    return torch.ops.aten._unsafe_view.default(flat, [*like.shape[:-1], last])


def pieces(shape: Sequence[int], device: torch.device) -> Iterator[tuple[int, int]]:
    """The ranges (start, stop) of rows of W to unpack at a time: equal pieces on a CPU, all rows elsewhere."""
    outputs, inputs = shape
    count = max(1, round(outputs * inputs / _PIECE)) if device.type == "cpu" else 1
    size = -(-outputs // count)
    size += -size % 64 if count > 1 else 0  # so that each piece starts at a block of entries
    for start in range(0, outputs, size):
        yield start, min(start + size, outputs)
