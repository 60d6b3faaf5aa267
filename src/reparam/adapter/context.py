"""What a forward has to be told beside its inputs, for adapters whose gates go by it: `with context(model, ...)`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from reparam.adapter.selection import state_of
from reparam.methods.mixture.common import Common, Given, Tasks


@contextlib.contextmanager
def context(
    model: nn.Module,
    *,
    tasks: Tasks | None = None,
    mask: Tensor | None = None,
    prompt: int | Sequence[int] | Tensor | None = None,
    experts: Sequence[int] | None = None,
    accumulation: int = 1,
) -> Iterator[None]:
    """Tell the mixtures on `model` about the forwards inside the `with`.

    Args:
        model: has adapters on it.
        tasks: the task of every row, or one for each of them, by name or number. `model(..., task=...)` says the same
            for one forward and comes first. Merging takes the one task that is named here.
        mask: [B, L], the tokens that are no padding. By default the forward's own `attention_mask`, if that is 2-D.
        prompt: how many of the tokens are the prompt, padding not counted, for gates of whole sequences. By default
            what comes before the first label, or in a forward with an empty cache all of it.
        experts: numbers of the experts that may be used; they share the others' part in proportion.
        accumulation: how many forwards one optimizer step is made of, where each forward's loss is divided by that.
            Auxiliary losses are then divided as well. transformers' Trainer tells it to most models by itself.

    Raises ValueError where no mixture is on the model, and for tasks, experts or lengths that cannot be.
    """
    state = state_of(model)
    found = [cast(Common, adapter.shared) for adapter in state.adapters.values() if adapter.method.takes_context]
    if not found:
        raise ValueError("context: no adapter on this model is a mixture, which is what this tells something to")
    if accumulation < 1:
        raise ValueError(f"context: accumulation={accumulation}: expected a whole number of at least 1")
    lengths = None if prompt is None else torch.as_tensor(prompt)
    if lengths is not None and (lengths.is_floating_point() or lengths.ndim > 1 or bool((lengths < 1).any())):
        raise ValueError(f"context: prompt={prompt!r}: expected lengths of at least 1, one or one per row")
    if mask is not None and mask.ndim != 2:
        raise ValueError(f"context: mask has shape {list(mask.shape)}; expected [rows, tokens]")
    device = next(model.parameters()).device
    before = [common.given for common in found]
    by_task = [len(common.tasks) > 1 for common in found]
    if tasks is not None and not any(by_task):
        raise ValueError("context: tasks are given, and no adapter on this model has more than one")
    numbers = [common.numbers(tasks) if several else None for common, several in zip(found, by_task, strict=True)]
    for common, task in zip(found, numbers, strict=True):
        common.given = Given(
            tasks=None if task is None else task.to(device),
            mask=None if mask is None else mask.bool().to(device),
            prompt=None if lengths is None else lengths.to(device),
            experts=None if experts is None else _mask(experts, common.n).to(device),
            accumulation=accumulation,
        )
        common.begin()  # for parts of a model that are called without the whole, as a T5's encoder is in generation
    try:
        state.refresh()
        yield
    finally:
        for common, given in zip(found, before, strict=True):
            common.given = given
        state.forget_factors()


def tasks_of(model: nn.Module) -> tuple[str, ...]:
    """Names of the tasks that the selected adapter has to be told, in the order of their numbers; none for others."""
    common = _selected(model)
    return common.tasks if common is not None and len(common.tasks) > 1 else ()


def told(model: nn.Module, batch: Mapping[str, Tensor]) -> contextlib.AbstractContextManager[None]:
    """Tell the selected adapter what a collated batch says beside the inputs: `task`, and the prompts, by `labels`.

    For forwards without labels. It does nothing where no mixture is selected.
    """
    common = _selected(model)
    if common is None:
        return contextlib.nullcontext()
    answered = batch["labels"].ne(-100)  # [B, L]; a label is predicted from the tokens before it
    answered[:, 0] = False
    prompt = (batch["attention_mask"].bool() & (answered.cumsum(1) == 0)).sum(1)
    return context(model, tasks=batch.get("task") if len(common.tasks) > 1 else None, prompt=prompt)


def _selected(model: nn.Module) -> Common | None:
    """What the sites of the selected adapter share, if that is a mixture."""
    choice = state_of(model).choice if hasattr(model, "reparam_state") else None
    adapter = state_of(model).adapters[choice] if isinstance(choice, str) else None
    return cast(Common, adapter.shared) if adapter is not None and adapter.method.takes_context else None


def _mask(experts: Sequence[int], n: int) -> Tensor:
    """Where these experts are, [N] bool."""
    wrong = [i for i in experts if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < n]
    if wrong or not experts:
        what = f"{wrong[0]!r} is none of the {n} experts, whose numbers are from 0" if wrong else "none would be left"
        raise ValueError(f"context: experts: {what}")
    return torch.tensor([i in experts for i in range(n)])
