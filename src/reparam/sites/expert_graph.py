"""The forward of a module of experts in a compiled graph.

In a graph, the numbers of rows of the experts are a tensor. So the loop over the experts that have rows, and what
stands for the stacked parameters otherwise (`stacks.py`), cannot be traced. Instead the steps of transformers'
decorator are computed here with one op for each stacked parameter (`kernels/grouped_op.py`).

Shapes: N tokens, K experts of a token, S = N · K rows sorted by expert, E experts, O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reparam.kernels.grouped_op import grouped
from reparam.sites.expert import Expert

Product = tuple[Tensor, list[Tensor], list[Tensor], list[float], list[int]]
"""W [E, O, I], and the factors of the experts that have an active update: A, B, s and the expert's number."""


def product_of(weight: Tensor | None, experts: Sequence[Expert], transposed: bool) -> Product | None:
    """The product of a stacked parameter; None if it is quantized, or an update is no product of two factors."""
    if weight is None or (autocast_dtype(weight) or weight.dtype) is not weight.dtype:
        return None
    A: list[Tensor] = []
    B: list[Tensor] = []
    scales: list[float] = []
    numbers: list[int] = []
    for number, expert in enumerate(experts):
        if expert.active is None:
            continue
        update: Any = expert.update_of(expert.active)
        found = None if update is None else update.product()
        if found is None:
            return None
        A.append(found[0])
        B.append(found[1])
        scales.append(found[2])
        numbers.append(number)
    weight = weight.detach()
    return weight.transpose(1, 2) if transposed else weight, A, B, scales, numbers


def autocast_dtype(like: Tensor) -> torch.dtype | None:
    """The dtype of autocast on the device of a tensor; None if it is off."""
    device = like.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def forward(
    module: Any, products: dict[str, Product], x: Tensor, chosen: Tensor, weights: Tensor, *, first: str, last: str
) -> Tensor:
    """x [N, H], the chosen experts [N, K] and their weights [N, K] -> the output [N, H].

    `first` and `last` are the names of the two stacked parameters, in the order in which they are applied.
    """
    count, numbers = chosen.shape[-1], chosen.reshape(-1)
    order = torch.argsort(numbers, stable=True)
    numbers = numbers[order]
    ends = torch.searchsorted(numbers, torch.arange(module.num_experts, device=x.device), right=True)

    def linear(rows: Tensor, name: str) -> Tensor:
        y = grouped(rows.to(products[name][0].dtype), ends, *products[name])
        bias = getattr(module, f"{name}_bias") if module.has_bias else None
        return y if bias is None else y + bias[numbers]

    y = linear(x[order // count], first)
    y = linear(module._apply_gate(y) if module.has_gate else module.act_fn(y), last)
    if module.has_post_expert_norm:
        y = module.post_expert_norm(y)
    y = y * weights.reshape(-1)[order].unsqueeze(-1)
    return y[torch.argsort(order)].view(len(x), count, -1).sum(1).to(x.dtype)
