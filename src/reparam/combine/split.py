"""Split a mixture whose gates depend only on the task into one LoRA per task."""

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
    """Put a frozen LoRA on the model for each task of the mixture `name`, and return these adapters by task.

    The LoRAs are named `name-task` and compute the same as the mixture for that task, up to rounding. Unlike the
    mixture, they can be selected as a list, with one task per row, and saved in PEFT's format. The mixture stays on the
    model.

    Raises ValueError if the adapter is not a mixture of low-rank experts, also trains biases or whole modules, or if a
    name is taken; raises `InputDependentError` if the gates depend on more than the task. The model is then unchanged.
    """
    state = state_of(model)
    state.check(name)
    adapter = state.adapters[name]
    method = adapter.method
    tasks = method.low_rank_tasks
    if tasks is None:
        raise ValueError(f"split: {name!r} ({method.name}) is not a mixture of low-rank experts")
    if adapter.replaced or any(key.endswith(".bias") for key in adapter.tensors() if not key.startswith(SHARED)):
        raise ValueError(f"split: {name!r} also trains biases or whole modules, which cannot be split by task")
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
