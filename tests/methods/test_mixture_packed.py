"""Mixtures in packed batches: losses, auxiliary losses and gradients are those of the same sequences in rows."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from mixtures import BY_TASK, SMALL, adapted
from torch import Tensor

import reparam
from reparam.data.batches import Collator
from reparam.data.packing import PackedCollator

LENGTHS, PACKS, TASKS = (5, 3, 2, 4), ((0, 1), (2, 3)), (2, 0, 1, 0)  # the second pack gets padding
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in SMALL},
    "static": ("llava_mole", {"router": "static", "router_bias": False}),
    "a sequence's first tokens": ("llava_mole", {"router": "sequence", "router_bias": False}),
    "every token of a sequence": ("mole", {"pool": "all"}),
    "importance by row": ("loramoe", {"losses": {"loramoe_blc": 0.1, "router_z": 0.01}}),
    "typed importance": ("loramoe", {"blc_alpha": 0.5, "tasks": ("a", "b")}),
}


def examples() -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    found = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(0, 50, (length,), generator=draw)
        labels = ids.clone()
        labels[: max(1, length // 2)] = -100
        found.append({"input_ids": ids, "labels": labels, "row": torch.tensor(number)})
    return found


def batches(tasks: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same sequences in rows and in packs."""
    rows = examples()
    packs = [
        {
            **{key: torch.cat([rows[i][key] for i in pack]) for key in ("input_ids", "labels")},
            "position_ids": torch.cat([torch.arange(LENGTHS[i]) for i in pack]),
            "row": torch.tensor(pack),
        }
        for pack in PACKS
    ]
    if tasks:
        rows = [{**row, "task": torch.tensor(task)} for row, task in zip(rows, tasks, strict=True)]
        for pack, members in zip(packs, PACKS, strict=True):
            pack["task"] = torch.cat([torch.full((LENGTHS[i],), tasks[i]) for i in members])
    found = Collator(0)(rows), PackedCollator(0)(packs)
    for batch in found:
        del batch["row"]
    return found


@pytest.mark.parametrize("case", CASES)
def test_packs_give_what_rows_give(case: str) -> None:
    name, changes = CASES[case]
    model, adapter = adapted(name, models.llama(), **{"dropout": 0.0, **changes})
    model.double().train()
    known = len(adapter.method.tasks)
    found = []
    for batch in batches(tuple(task % known for task in TASKS) if known > 1 else ()):
        model.zero_grad()
        torch.manual_seed(0)
        loss = model(**batch, num_items_in_batch=torch.tensor(9)).loss
        loss.backward()
        grads = {name: parameter.grad for name, parameter, _ in adapter.named_parameters()}
        found.append((loss.detach(), adapter.losses(), grads))
    (loss, losses, grads), (packed_loss, packed_losses, packed_grads) = found
    assert torch.allclose(packed_loss, loss, rtol=1e-9)
    assert packed_losses == pytest.approx(losses, rel=1e-6)
    assert any(grad is not None and bool(grad.any()) for grad in grads.values())
    for name, grad in grads.items():
        if grad is not None:
            assert torch.allclose(packed_grads[name], grad, rtol=1e-6, atol=1e-9), name


def test_a_sequence_does_not_change_its_neighbor() -> None:
    model, _ = adapted("mole", models.llama(), pool="all")
    _, batch = batches(())
    del batch["labels"]
    with torch.no_grad():
        first = model.eval()(**batch).logits
        batch["input_ids"][0, LENGTHS[0]] += 1  # the first token of the second sequence
        second = model(**batch).logits
    assert torch.allclose(first[0, : LENGTHS[0]], second[0, : LENGTHS[0]], atol=1e-6)
    assert not torch.allclose(first[0, LENGTHS[0] :], second[0, LENGTHS[0] :], atol=1e-3)


@pytest.mark.parametrize("name", BY_TASK)
def test_tasks_are_counted_by_sequence(name: str) -> None:
    model, _ = adapted(name)
    _, batch = batches(())
    del batch["labels"]
    with pytest.raises(ValueError, match="3 tasks were given, but the batch has 4 sequences"):
        model(**batch, task=[0, 1, 2])
    with torch.no_grad(), reparam.context(model, tasks=list(TASKS)):
        model(**batch)
