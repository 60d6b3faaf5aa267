"""PagedAdamW with 8-bit states, compared with 32 bits and bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from paged_runs import BLOCK_BYTES, make, run
from torch import nn

import reparam
from reparam.optim import PagedAdamW


def train(bits: int, steps: int, **settings: Any) -> list[float]:
    """Losses of a small Llama with LoRA, on one batch."""
    model = models.llama()
    adapter = reparam.attach(model, reparam.LoRA(r=4, alpha=8))
    optimizer = PagedAdamW(adapter.parameters(), 0.02, bits=bits, **settings)
    losses = []
    for _ in range(steps):
        loss = models.loss(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_8_bits_learn_as_32_do() -> None:
    full, small = train(32, 40), train(8, 40)
    assert small[0] == full[0]
    assert full[-1] < full[0] / 2
    assert abs(small[-1] - full[-1]) < 0.01 * (full[0] - full[-1])
    assert max(abs(a - b) for a, b in zip(full, small, strict=True)) < 0.02 * full[0]
    assert train(8, 40, page=5200, budget=5200) == small


def test_8_bits_are_as_near_to_32_as_those_of_bitsandbytes() -> None:
    """With gradients of very different sizes in a block, where rounding loses the small ones."""
    judge = pytest.importorskip("bitsandbytes.optim")
    kinds: list[Callable[[list[Any]], torch.optim.Optimizer]] = [
        lambda p: torch.optim.AdamW(p, 1e-2),
        lambda p: PagedAdamW(p, 1e-2, bits=8),
        lambda p: judge.AdamW8bit(p, 1e-2),
    ]
    ends = []
    for make_optimizer in kinds:
        draw = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.zeros(64, 256))
        towards = torch.randn(64, 256, generator=draw) ** 3
        optimizer = make_optimizer([p])
        for _ in range(50):
            p.grad = towards * torch.randn(64, 256, generator=draw).add_(1)
            optimizer.step()
        ends.append(p.detach())
    exact, ours, theirs = ends
    assert (ours - exact).norm() < (theirs - exact).norm()


def test_a_small_gradient_beside_a_large_one_is_not_stepped_with_eps_alone() -> None:
    """Its second moment is below the first level; rounded to zero, the next step would be far too large."""
    p = nn.Parameter(torch.zeros(2))
    optimizer = PagedAdamW([p], 0.001, bits=8, weight_decay=0.0)
    for gradient in ([1.0, 1e-4], [1.0, 0.0]):
        before = p.detach().clone()
        p.grad = torch.tensor(gradient)
        optimizer.step()
        assert ((p - before).abs() <= 0.0011).all()


def test_bytes_per_element() -> None:
    for bits, expected in ((32, 8.0), (8, 2.03125)):
        optimizer = PagedAdamW(make([(256, 64)]), bits=bits, page=64 * BLOCK_BYTES[bits])
        run(optimizer, range(1))
        assert optimizer.paging.total / (256 * 64) == expected
