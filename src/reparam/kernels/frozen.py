"""A frozen linear map as one op: y = x Wᵀ + b, where W is unpacked on the way and nothing is kept for backward.

`frozen_linear` registers two ops for a storage, `reparam::<name>_linear` and `reparam::<name>_linear_grad`, from the
one function that unpacks it. W is frozen, so the gradient of x needs g and W alone: neither x nor the unpacked W is
saved, only the packed tensors, which are there anyway. `torch.compile` sees one op.

Shapes: O out_features, I in_features; x [..., I], g and y [..., O].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Unpack = Callable[..., Tensor]
Product = Callable[..., Tensor | None]


def frozen_linear(name: str, packed: str, unpack: Unpack, product: Product | None = None) -> Callable[..., Tensor]:
    """Register the ops of a storage, and return the function that calls them.

    Args:
        name: the storage's.
        packed: its tensors and numbers in the words of an op's schema, as "Tensor codes, Tensor? offset, int block".
        unpack: from these, the shape [O, I] and a dtype, to W [O, I] in that dtype.
        product: a faster x Wᵀ for some x [N, I], or None to unpack: a fused kernel for a few rows.

    Returns:
        f(x, packed, shape, bias): the output in the dtype of x, or autocast's, differentiable in x and the bias.

    >>> half = frozen_linear("doc_half", "Tensor w", lambda w, shape, dtype: w.to(dtype))
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
        found = product(x.view(-1, shape[1]), *parts, shape) if product is not None and x.is_contiguous() else None
        if found is None:
            return F.linear(x, unpack(*parts, shape, x.dtype), bias)
        y = found.view(*x.shape[:-1], shape[0])
        return y if bias is None else y.add_(bias)

    def backward(g: Tensor, *rest: Any) -> Tensor:
        *parts, shape = rest
        return g @ unpack(*parts, shape, g.dtype)

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
        saved = iter(ctx.saved_tensors)
        parts = [next(saved) if tensor else part for tensor, part in zip(ctx.tensors, ctx.rest, strict=True)]
        needs_x, needs_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[-1]
        g_x = run_backward(g, *parts, ctx.shape) if needs_x else None
        return g_x, *[None] * (count + 1), g.reshape(-1, g.shape[-1]).sum(0) if needs_bias else None

    torch.library.register_autograd(forward_name, differentiate, setup_context=keep)

    def call(x: Tensor, parts: Sequence[Any], shape: Sequence[int], bias: Tensor | None) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        bias = bias if bias is None else bias.to(dtype)
        return run(x.to(dtype), *parts, list(shape), bias)

    return call
