"""A mixture whose gates go by the task, as one plain LoRA for each task: for mixed batches, and for other libraries."""

from __future__ import annotations

import re

import torch
from torch import nn

from reparam.adapter.adapter import Adapter
from reparam.adapter.attach import check_name, install
from reparam.adapter.context import context
from reparam.adapter.selection import state_of
from reparam.methods import patterns
from reparam.methods.lora import LoRA
from reparam.sites.module import SHARED


@torch.no_grad()
def split(model: nn.Module, name: str) -> dict[str, Adapter]:
    """Put a frozen LoRA on the model for each task of the mixture `name`; the handles by task. The mixture stays.

    They are called `name-task`, and compute what the mixture does for the task (but for rounding). Unlike it, they can
    be selected in one list, a task for each row, and be saved for PEFT.

    Raises ValueError where the adapter is no mixture of low-rank experts or a name is taken, and `InputDependentError`
    where the gates look at more than the task; nothing is on the model then that was not before.
    """
    state = state_of(model)
    state.check(name)
    adapter = state.adapters[name]
    method = adapter.method
    tasks = method.low_rank_tasks
    if tasks is None:
        raise ValueError(f"split: {name!r} ({method.name}) is no mixture of low-rank experts")
    if adapter.replaced or any(key.endswith(".bias") for key in adapter.tensors() if not key.startswith(SHARED)):
        raise ValueError(f"split: {name!r} also trains biases or whole modules, which are not the tasks' own")
    names = {task: f"{name}-{re.sub(r'[^A-Za-z0-9_-]', '_', task)}" for task in tasks}
    changes = {}
    for task, called in names.items():
        check_name(model, called)
        with context(model, tasks=task if len(names) > 1 else None):
            changes[task] = {
                path: update.factors(adapter.modules[path].frozen) for path, update in adapter.updates.items()
            }
    found = {}
    for task, factors in changes.items():
        ranks = {path: len(f.A) for path, f in factors.items()}
        most = max(ranks.values())
        own = patterns.exactly({path: rank for path, rank in ranks.items() if rank != most})
        plain = LoRA(r=most, alpha=float(most), scaling="none", rank_pattern=own)
        made = install(model, plain, names=list(factors), replaced=[], name=names[task], bias=False)
        tensors = made.tensors()
        for path, f in factors.items():
            tensors[f"{path}.A"].copy_(f.A)
            tensors[f"{path}.B"].copy_(f.B)
        found[task] = made.requires_grad_(False)
    return found
