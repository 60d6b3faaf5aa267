"""Mixtures on tasks that contradict each other: a small linear teacher for each, over shared inputs.

Errors are those of the trained map on new rows, over the error of the base. All methods have the same total rank.
"""

import functools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reparam
from reparam.core.registry import METHODS

TASKS, WIDTH, RANK = 4, 16, 2


@functools.cache
def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Means [K, I] that reveal the task of tokens, teacher updates [K, O, I] of rank 2, and W [O, I]."""
    generator = torch.Generator().manual_seed(4)
    means = 1.5 * torch.randn(TASKS, WIDTH, generator=generator)
    up, down = (torch.randn(TASKS, WIDTH, RANK, generator=generator) for _ in range(2))
    return means, up @ down.transpose(1, 2) / WIDTH**0.5, torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5


def batch(seed: int, rows: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [B, 3, I], a task for each row, and the outputs of the tasks' teachers."""
    means, changes, W = problem()
    generator = torch.Generator().manual_seed(seed)
    tasks = torch.randint(TASKS, (rows,), generator=generator)
    x = means[tasks][:, None] + torch.randn(rows, 3, WIDTH, generator=generator)
    return x, tasks, torch.einsum("boi,bti->bto", W + changes[tasks], x)


def error(name: str, **settings: Any) -> float:
    """The error after training, over the base's."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(problem()[2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = reparam.attach(model, METHODS[name](**settings), targets=["0"])
    told = len(getattr(adapter.method, "tasks", ())) > 1
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    model.train()
    for step in range(400):
        x, tasks, y = batch(step)
        found = model(x, task=tasks) if told else model(x)
        (found - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    x, tasks, y = batch(10**6, rows=512)
    with torch.no_grad():
        found = model(x, task=tasks) if told else model(x)
        with reparam.select(model, None):
            base = model(x)
    return float((found - y).square().mean() / (base - y).square().mean())


NAMES = ("a", "b", "c", "d")
PLAIN = ("lora", {"r": TASKS * RANK, "alpha": 2.0 * TASKS * RANK})
GATED = ("task_gated", {"n": TASKS, "r": TASKS * RANK, "tasks": NAMES, "init": "kaiming_uniform", "init_std": None})
TOKEN = ("molora", {"n": TASKS, "r": RANK, "alpha": 4.0, "router_std": 0.1})
TOP = {"n": TASKS, "r": RANK, "alpha": 4.0, "select": "top_k", "router_std": 0.1}


def test_a_gate_by_the_task_solves_what_one_lora_cannot() -> None:
    assert error(PLAIN[0], **PLAIN[1]) > 0.25
    assert error(GATED[0], **GATED[1]) < 0.02


def test_a_gate_by_the_token_finds_the_tasks_itself() -> None:
    assert error(TOKEN[0], **TOKEN[1]) < 0.4 * error(PLAIN[0], **PLAIN[1])


@pytest.mark.parametrize(("settings", "share"), [({"k": 2, "gate": "renorm"}, 0.6), ({"gate": "prob"}, 0.8)])
def test_top_k_gates_that_learn_do_better_than_one_that_cannot(settings: dict, share: float) -> None:
    assert error("mixture", **TOP, **settings) < share * error("mixture", **TOP, gate="one")
