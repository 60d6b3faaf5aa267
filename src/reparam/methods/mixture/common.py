"""State that all sites of one mixture share: routers of a scope wider than a module, and the current forward pass.

While the adapter is selected, `Common.before_forward` is a forward pre-hook of the model's root. For each forward pass
it makes a new `Forward` from the model's arguments (`attention_mask`, `labels`, a cache, `task`) and from the values of
`reparam.context`. Sites read it, and write their gates and losses into it, not into modules. It stays until the next
forward pass, because gradient checkpointing computes sites again during the backward pass.

Shapes: B rows of a batch, L tokens of a row, N experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reparam.core.checks import nearest
from reparam.core.surface import advice
from reparam.methods.mixture.forward import Forward, Given
from reparam.methods.mixture.packs import packs_of
from reparam.methods.mixture.routers import Router
from reparam.methods.mixture.two_pass import ByCache, FirstPass

Tasks = int | str | Sequence[int | str] | Tensor
COLUMN = "task"
"""Keyword argument of the model for tasks: a name or number, one per row [B], or in packs one per token [B, L], that of
its sequence. It is not passed on to the model."""
LAST = "logits_to_keep"
"""The argument by which generation lets the output head see the last vectors of the prompt alone."""


class Common(nn.Module):
    """The state that all sites of a mixture share. The model's root owns it, saves it, trains it and moves it.

    Args:
        tasks: names of the tasks.
        routers: routers of a scope wider than one module, by scope.
        leaders: the first site of each scope, which computes its gates.
        n: number of experts.
    """

    def __init__(
        self, tasks: tuple[str, ...], routers: Mapping[str, Router], leaders: Mapping[str, str], n: int
    ) -> None:
        super().__init__()
        self.routers = nn.ModuleDict({key(scope): router for scope, router in routers.items()})
        self.tasks = tasks
        self.leaders = dict(leaders)
        self.n = n
        self.given = Given()
        self.now = Forward()
        self.first_pass = FirstPass()
        self.silent = False  # True while the first pass runs, in which sites compute the base model
        self.contrasts = True  # whether the contrastive loss is on (see `Warmup`)
        self.kept = ByCache()  # KV cache -> gates of its sequences by scope or site

    def numbers(self, tasks: Tasks | None) -> Tensor | None:
        """Convert tasks, given by name or number, to numbers [] or [B] int64; None stays None.

        Raises ValueError for an unknown name, a number out of range, or a tensor of another dtype or shape.
        """
        if tasks is None or (isinstance(tasks, Tensor) and torch.compiler.is_compiling()):
            return tasks  # a compiled graph cannot branch on values: no check
        if not isinstance(tasks, Tensor):
            if isinstance(tasks, int | str):
                return torch.tensor(self._number(tasks))
            return torch.tensor([self._number(task) for task in tasks], dtype=torch.int64)
        if tasks.is_floating_point() or tasks.is_complex() or tasks.dtype == torch.bool or tasks.ndim > 1:
            raise ValueError(f"tasks: {tasks.dtype} {list(tasks.shape)}; expected whole numbers, one or one per row")
        outside = (tasks < 0) | (tasks >= len(self.tasks))
        if bool(outside.any()):
            raise ValueError(f"tasks: {int(tasks[outside][0])} is not one of {self._known()}")
        return tasks.long()

    def _number(self, task: int | str) -> int:
        if isinstance(task, str):
            if task not in self.tasks:
                raise ValueError(f"tasks: {task!r} is not one of {self._known()}{nearest(task, self.tasks)}")
            return self.tasks.index(task)
        if isinstance(task, bool) or not isinstance(task, int) or not 0 <= task < len(self.tasks):
            raise ValueError(f"tasks: {task!r} is not one of {self._known()}")
        return task

    def _known(self) -> str:
        return f"the {len(self.tasks)} tasks ({', '.join(self.tasks)}; numbers from 0)"

    def begin(self) -> None:
        """Begin a forward pass for which only the values of `reparam.context` are known."""
        given = self.given
        self.now = Forward(tasks=given.tasks, mask=given.mask, prompt=given.prompt, experts=given.experts)

    def before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Begin a forward pass; this is the hook on the model. Removes `task` from the model's arguments.

        Raises ValueError for unknown tasks, for a number of tasks other than that of the rows, and, with the router
        "two_pass", for a cache with tokens that the first pass has not seen.
        """
        if self.silent:
            return None
        given = self.given
        named = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args, *kwargs.values())
        batch = next((x for x in named if isinstance(x, Tensor)), None)  # else any tensor argument
        rows = None if batch is None or batch.ndim == 0 else batch.shape[0]
        packs = packs_of(kwargs)
        named_tasks = kwargs.get(COLUMN)
        if packs is not None and isinstance(named_tasks, Tensor) and packs.fits(named_tasks.shape):
            named_tasks = packs.of_sequences(named_tasks)
        tasks = self.numbers(named_tasks) if named_tasks is not None else given.tasks
        count, what = (rows, "rows") if packs is None else (len(packs), "sequences")
        if tasks is not None and tasks.ndim and count is not None and len(tasks) != count:
            raise ValueError(
                f"{len(tasks)} tasks were given, but the batch has {count} {what}; give one task, or one per row "
                f"(repeat each task for each of its beams or returned sequences)"
            )
        if tasks is not None and batch is not None:
            tasks = tasks.to(batch.device)
        config = getattr(model, "config", None)
        two_sided = bool(getattr(config, "is_encoder_decoder", False))
        mask = given.mask if given.mask is not None else kwargs.get("attention_mask")
        mask = packs.mask if packs is not None else mask
        labels = None if two_sided else kwargs.get("labels")  # the decoder's labels do not show the encoder's prompt
        self.now = Forward(
            rows=rows,
            tokens=batch.shape[1] if batch is not None and batch.ndim > 1 else None,
            tasks=tasks,
            mask=mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None,
            prompt=given.prompt,
            labels=labels if isinstance(labels, Tensor) and labels.ndim == 2 else None,
            experts=given.experts,
            packs=packs,
            two_sided=two_sided,
            share=_share(kwargs.get("labels"), kwargs.get("num_items_in_batch"), given.accumulation),
        )
        cache: Any = kwargs.get("past_key_values")
        if hasattr(cache, "get_seq_length"):
            self.now.continues = cache.get_seq_length() > 0
            # None for a cache that was filled without this adapter. A site that needs its gates then raises an error.
            self.now.kept = self.kept.get(cache) if self.now.continues else self.kept.setdefault(cache, {})
        if any(router.reads == "hidden" for router in self.routers.values()):
            self.silent = True
            try:
                self.now.hidden = self.first_pass(model, args, kwargs)
            finally:
                self.silent = False
        removed = {COLUMN}
        if not self.now.continues and self._reads_at_head(model):
            removed.add(LAST)
        if removed.isdisjoint(kwargs):
            return None
        return args, {name: value for name, value in kwargs.items() if name not in removed}

    def _reads_at_head(self, model: nn.Module) -> bool:
        """Whether a gate at the output head reads whole sequences, whose last vectors alone would not do."""
        find = getattr(model, "get_output_embeddings", None)
        updates = getattr(find() if find is not None else None, "updates", {})
        mine = (update for update in updates.values() if getattr(update, "owner", (None,))[0] is self)
        return any(update.reads == "sequence" for update in mine)

    def losses(self) -> dict[str, float]:
        """Auxiliary losses of the last forward pass by name, each the mean over the sites that compute it."""
        by_name: dict[str, list[Tensor]] = {}
        for (name, _), value in self.now.losses.items():
            by_name.setdefault(name, []).append(value.double())
        return {name: float(torch.stack(values).mean()) for name, values in by_name.items()}

    def task_ids(self) -> Tensor:
        """The tasks of the current forward pass, [] or [B] int64. Raises ValueError if they were not given."""
        if self.now.tasks is not None:
            return self.now.tasks
        return self._only(None, "this forward pass")

    def known_task(self) -> Tensor:
        """The single task set by `reparam.context`, [] int64. Raises ValueError if none or several are set."""
        return self._only(self.given.tasks, "merging")

    def _only(self, tasks: Tensor | None, what: str) -> Tensor:
        if tasks is not None and tasks.ndim == 0:
            return tasks
        if len(self.tasks) == 1 and tasks is None:
            device = next((p.device for p in self.parameters()), None)
            return torch.zeros((), dtype=torch.int64, device=device)
        told = "no task was given" if tasks is None else "several tasks were given"
        remedy = advice("use reparam.context(model, tasks=...) with", "pass --task with")
        raise ValueError(f"{what} needs one task, and {told}; {remedy} one of {self._known()}")


def key(scope: str) -> str:
    """A scope (a module path, or "" for the model) as a valid submodule name."""
    return scope.replace(".", "/") or "model"


def _share(labels: Any, items: Any, accumulation: int) -> Tensor | float:
    """The share of this forward pass in the optimizer step, by tokens with a loss where transformers counts them."""
    if items is None or not isinstance(labels, Tensor):
        return 1 / accumulation
    return labels[..., 1:].ne(-100).sum() / items  # the first token has no loss
