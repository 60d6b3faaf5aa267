"""`with context(model, ...)`: pass tasks, masks and prompt lengths to the gates of mixture adapters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from reparam.adapter.selection import state_of
from reparam.methods.mixture.common import Common, Tasks
from reparam.methods.mixture.forward import Given
from reparam.sites.wrapped import bare

if TYPE_CHECKING:
    from reparam.adapter.adapter import Adapter


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
    """Set the inputs of the gates of all mixture adapters for the forward passes inside the `with` block.

    Shapes: B rows, L tokens per row, N experts.

    Args:
        model: a model with at least one mixture adapter.
        tasks: one task for all rows, or one per row [B], by name or number. The argument `model(..., task=...)` takes
            precedence in its forward pass. `merge` uses the one task that is given here.
        mask: [B, L], true for tokens that are not padding. Default: the `attention_mask` of the forward pass, if it is
            2-D.
        prompt: prompt length in tokens without padding, one for all rows or one per row [B], for gates of whole
            sequences. Default: the tokens before the first label, or all tokens of a forward pass with an empty cache.
        experts: indices in [0, N) of the experts that may be used. The gates of the others are distributed over these
            in proportion to their own gates.
        accumulation: number of forward passes per optimizer step, at least 1, if each pass's loss is divided by it.
            Auxiliary losses are then divided by it too. The transformers Trainer passes it to most models itself.

    Raises ValueError if the model has no mixture adapter, or if tasks, mask, prompt, experts or accumulation are
    invalid.
    """
    state = state_of(model)
    found = [common for adapter in state.adapters.values() if (common := _common(adapter)) is not None]
    if not found:
        raise ValueError("context: no adapter on this model is a mixture; only mixtures use these arguments")
    if accumulation < 1:
        raise ValueError(f"context: accumulation={accumulation}: expected a whole number of at least 1")
    lengths = None if prompt is None else torch.as_tensor(prompt)
    if lengths is not None and (lengths.is_floating_point() or lengths.ndim > 1 or bool((lengths < 1).any())):
        raise ValueError(f"context: prompt={prompt!r}: expected one length, or one per row, of at least 1 token")
    if mask is not None and mask.ndim != 2:
        raise ValueError(f"context: mask has shape {list(mask.shape)}; expected [rows, tokens]")
    device = next(model.parameters()).device
    before = [common.given for common in found]
    by_task = [len(common.tasks) > 1 for common in found]
    if tasks is not None and not any(by_task):
        raise ValueError("context: tasks were passed, but no adapter on this model has more than one task")
    numbers = [common.numbers(tasks) if several else None for common, several in zip(found, by_task, strict=True)]
    for common, task in zip(found, numbers, strict=True):
        common.given = Given(
            tasks=None if task is None else task.to(device),
            mask=None if mask is None else mask.bool().to(device),
            prompt=None if lengths is None else lengths.to(device),
            experts=None if experts is None else _mask(experts, common.n).to(device),
            accumulation=accumulation,
        )
        common.begin()  # for submodules that are called without the whole model, such as T5's encoder in generation
    try:
        state.refresh()
        yield
    finally:
        for common, given in zip(found, before, strict=True):
            common.given = given
        state.forget_factors()


def tasks_of(model: nn.Module) -> tuple[str, ...]:
    """Task names of the selected adapter, in the order of their numbers; empty if its gates do not use the task."""
    common = _selected(model)
    return common.tasks if common is not None and len(common.tasks) > 1 else ()


def told(model: nn.Module, batch: Mapping[str, Tensor]) -> contextlib.AbstractContextManager[None]:
    """Return a context that passes the batch's tasks and prompt lengths (derived from its labels) to the gates.

    Use it for forward passes that get no labels. The context does nothing if no mixture adapter is selected.
    """
    common = _selected(model)
    if common is None:
        return contextlib.nullcontext()
    answered = batch["labels"].ne(-100)  # [B, L]; a label is predicted from the tokens before it
    answered[:, 0] = False
    prompt = (batch["attention_mask"].bool() & (answered.cumsum(1) == 0)).sum(1)
    return context(model, tasks=batch.get("task") if len(common.tasks) > 1 else None, prompt=prompt)


def _selected(model: nn.Module) -> Common | None:
    """The shared state of the selected adapter if it is a mixture, else None."""
    choice = state_of(model).choice if hasattr(bare(model), "reparam_state") else None
    return _common(state_of(model).adapters[choice]) if isinstance(choice, str) else None


def _common(adapter: Adapter) -> Common | None:
    """The shared state of a mixture, else None."""
    return cast(Common, adapter.shared) if adapter.method.takes_context and adapter.shared is not None else None


def _mask(experts: Sequence[int], n: int) -> Tensor:
    """A mask [N] (bool) that is true for these experts. Raises ValueError for an invalid index or an empty list."""
    wrong = [i for i in experts if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < n]
    if wrong or not experts:
        what = f"expected indices from 0 to {n - 1}, found {wrong[0]!r}" if wrong else "the list is empty"
        raise ValueError(f"context: experts: {what}")
    return torch.tensor([i in experts for i in range(n)])
