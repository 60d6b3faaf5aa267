"""Runs of PagedAdamW on gradients that depend only on the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

BITS = pytest.mark.parametrize("bits", [32, 8])


BLOCK_BYTES = {32: 2048, 8: 520}
SIZES = [(40, 30), (7,), (0,), (256,), (3, 5, 7), (1,), (2000,)]


def make(sizes: Sequence[Sequence[int]] = SIZES, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Any]:
    draw = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(tuple(size), generator=draw).to(device, dtype)) for size in sizes]


def give_gradients(parameters: Sequence[Tensor], step: int, missing: Callable[[int, int], bool] | None = None) -> None:
    """Set gradients of very different sizes that depend only on the step and the parameter's index."""
    for number, p in enumerate(parameters):
        draw = torch.Generator().manual_seed(1000 * step + number)
        gradient = torch.randn(p.shape, generator=draw) * torch.rand(p.shape, generator=draw) ** 4
        p.grad = None if missing is not None and missing(step, number) else gradient.to(p.device, p.dtype)


def two_groups(parameters: list[Any], **first: Any) -> list[dict[str, Any]]:
    return [{"params": parameters[:3], **first}, {"params": parameters[3:], "lr": 0.02, "weight_decay": 0.0}]


def run(
    optimizer: torch.optim.Optimizer, steps: range = range(6), missing: Callable[[int, int], bool] | None = None
) -> list[Tensor]:
    """The parameters after these steps, with a learning rate that changes."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in steps:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate / (1 + step)
        give_gradients(parameters, step, missing)
        optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return [p.detach().clone() for p in parameters]


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def sometimes(step: int, number: int) -> bool:
    return (step + number) % 3 == 0
