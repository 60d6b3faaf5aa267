"""A tiny model with AdaLoRA, its optimizer steps, and its remaining components."""

from typing import Any

import models
import torch
from torch import nn

import reparam
from reparam import AdaLoRA
from reparam.methods.adalora.budget import Budget
from reparam.methods.adalora.update import SVDUpdate, components
from reparam.optim import PagedAdamW

SHORT = {"init_r": 4, "target_r": 2, "alpha": 64, "total_steps": 10, "tinit": 2, "tfinal": 3}


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "paged, 32 bits": lambda p: PagedAdamW(p, lr=1e-2, page=2**13, budget=2**14),
    "paged, 8 bits": lambda p: PagedAdamW(p, lr=1e-2, bits=8),
}


def adapted(model: nn.Module | None = None, **settings: Any) -> tuple[Any, reparam.Adapter, Budget]:
    model = models.llama() if model is None else model
    adapter = reparam.attach(model, AdaLoRA(**{**SHORT, **settings}))
    assert isinstance(adapter.controller, Budget)
    return model, adapter, adapter.controller


def step(model: nn.Module, optimizer: torch.optim.Optimizer, *, seed: int = 0, micro: int = 1) -> float:
    """One optimizer step on random rows, over several micro-batches."""
    draw = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(micro):
        loss = models.loss(model, torch.randint(0, 90, (2, 6), generator=draw)) / micro
        loss.backward()
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    return total


def svd(adapter: reparam.Adapter) -> dict[str, SVDUpdate]:
    return {name: components(update) for name, update in adapter.updates.items()}


def ranks(adapter: reparam.Adapter) -> list[int]:
    return [len(update.E) for update in svd(adapter).values()]


def living(adapter: reparam.Adapter) -> int:
    return sum(int((update.E != 0).sum()) for update in svd(adapter).values())
