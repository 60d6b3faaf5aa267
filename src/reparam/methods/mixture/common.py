"""What all sites of one mixture have in common: routers of a scope wider than a module, and the current forward.

A forward of the model begins with `Common.before_forward`, a hook on the model's root while the adapter is selected. It
makes a new `Forward` from what the model is called with (`attention_mask`, `labels`, a cache, `task`) and what the
caller said by `reparam.context`. Sites read it and write gates and losses into it; nothing of it stays on a module. It
is there until the next forward, because gradient checkpointing computes sites again during the backward pass.

B rows, L tokens of a row, N experts.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reparam.core.checks import nearest
from reparam.methods.mixture.routers import Router
from reparam.methods.mixture.select import Gating
from reparam.methods.mixture.two_pass import FirstPass

Tasks = int | str | Sequence[int | str] | Tensor
COLUMN = "task"
"""What a model is called with to say the task of each row: a number or a tensor [B]. The model does not see it."""


@dataclasses.dataclass(frozen=True)
class Given:
    """What the caller said about the coming forwards; None for what it did not say."""

    tasks: Tensor | None = None  # [] or [B] int64
    mask: Tensor | None = None  # [B, L] bool, the tokens that are no padding
    prompt: Tensor | None = None  # [] or [B] int64, how many of a row's tokens are its prompt, padding not counted
    experts: Tensor | None = None  # [N] bool, the experts that may be used
    accumulation: int = 1


@dataclasses.dataclass(eq=False)
class Forward:
    """What is known about one forward, and what its sites have found so far."""

    rows: int | None = None
    tokens: int | None = None
    tasks: Tensor | None = None
    mask: Tensor | None = None
    prompt: Tensor | None = None
    labels: Tensor | None = None
    experts: Tensor | None = None
    share: Tensor | float = 1.0
    """Factor of auxiliary losses: the part that this forward's loss has in the optimizer's step."""
    hidden: Tensor | None = None
    """[B, L, H], the base's last hidden states."""
    kept: dict[str, Gating] | None = None
    """Gates of whole sequences, kept with the cache that the model was called with."""
    continues: bool = False
    """Whether the cache holds tokens from before."""
    gates: dict[str, Gating] = dataclasses.field(default_factory=dict)
    losses: dict[tuple[str, str], Tensor] = dataclasses.field(default_factory=dict)
    calls: dict[tuple[str, bool], int] = dataclasses.field(default_factory=dict)
    """How often each site was computed, in a backward pass and outside of one."""
    two_sided: bool = False
    """Whether the model is an encoder and a decoder, whose lengths differ."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        return Forward()  # a copy of a model is in no forward, and tensors inside a graph cannot be copied

    def recompute(self, site: str) -> None:
        """Raise RuntimeError where backward passes compute a site more often than this forward: for another one."""
        if torch.compiler.is_compiling():
            return
        backward = torch._C._current_graph_task_id() != -1  # no public function of torch tells
        self.calls[site, backward] = self.calls.get((site, backward), 0) + 1
        if backward and self.calls[site, True] > self.calls.get((site, False), 0):
            raise RuntimeError(
                f"{site}: gradient checkpointing computed it more often than its forward, so that one of them was for "
                f"an earlier forward, whose tasks and masks are gone; call backward after each forward"
            )

    def spread(self, gates: Tensor, lead: torch.Size) -> Tensor:
        """Gates [N], [B, N] or [*lead, N] in a shape that broadcasts to [*lead, N]."""
        if gates.ndim == 1 or gates.shape[:-1] == lead:
            return gates
        rows = len(gates)
        # Gates of rows, beside tokens in a dimension of their own, or in one with the rows, as in blocks of experts.
        if gates.ndim == 2 and lead and lead[0] == rows:
            return gates.view(rows, *[1] * (len(lead) - 1), -1)
        if gates.ndim == 2 and len(lead) == 1 and self.tokens is not None and lead[0] == rows * self.tokens:
            return gates.repeat_interleave(self.tokens, 0)
        if gates.shape[:-1].numel() == lead.numel():
            return gates.reshape(*lead, -1)
        raise ValueError(
            f"gates of shape {list(gates.shape)} do not fit an activation of shape {[*lead, '...']}: its rows cannot "
            f"be told apart, or it is another sequence than the one the gates are of"
        )

    def by_row(self, z: Tensor) -> Tensor:
        """z [..., I] as [B, L, I]; a vector alone is a row of one token."""
        if z.ndim == 1:
            return z[None, None]
        if z.ndim == 2 and self.rows is not None and self.tokens is not None and len(z) == self.rows * self.tokens:
            return z.view(self.rows, self.tokens, -1)
        return z[:, None] if z.ndim == 2 else z.flatten(1, -2)

    def valid(self, lead: torch.Size) -> Tensor | None:
        """Which tokens of an activation [*lead, I] are no padding, [*lead]; None where nothing is known of padding.

        The mask of an encoder is not its decoder's: where their lengths differ, all tokens of the decoder count.
        Raises ValueError for a mask that is not that of these tokens.
        """
        mask = self.mask
        if mask is None:
            return None
        # With a cache the mask covers the tokens before as well, and the activation has the new ones alone.
        if len(lead) == 2 and mask.shape[0] == lead[0] and self.continues:
            mask = mask[:, -lead[1] :]
        if mask.shape != lead and mask.numel() != lead.numel():
            if self.two_sided:
                return None
            raise ValueError(
                f"the attention mask has shape {list(mask.shape)}, and an activation has {list(lead)} tokens; give "
                f"their own mask with reparam.context(model, mask=...)"
            )
        return mask.reshape(lead)

    def pool(self, lead: torch.Size, over: str, device: torch.device) -> Tensor:
        """Which tokens of sequences [B, L] a gate may look at, bool: all that are no padding, or those of the prompt.

        Raises ValueError where it has to be the prompt, and nothing says what that is.
        """
        valid = self.valid(lead)
        valid = torch.ones(lead, dtype=torch.bool, device=device) if valid is None else valid
        if over == "all":
            return valid
        if self.prompt is not None:
            return valid & (valid.cumsum(1) <= self.prompt.to(device).view(-1, 1))
        if self.labels is not None and self.labels.shape == lead:
            # A label at i is predicted from the tokens before i: those before the first are the prompt.
            answered = self.labels.ne(-100)
            answered[:, 0] = False  # the first token is predicted from nothing, whatever its label is
            return valid & (answered.cumsum(1) == 0)
        if self.kept is not None:  # generation: the first forward with a cache holds the prompt
            return valid
        raise ValueError(
            "router 'sequence' looks at the prompt alone, and nothing says what the prompt is: train with labels, "
            "generate with a cache, or say reparam.context(model, prompt=lengths). pool='all' looks at every token, "
            "which in a causal model tells earlier positions about later ones"
        )


class Common(nn.Module):
    """Owned by the model's root: saved, trained and moved once, for all sites of the adapter.

    Args:
        tasks: names of the tasks.
        routers: those of a scope wider than one module, by scope.
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
        self.silent = False  # while the first pass runs, sites are the base
        self.contrasts = True  # whether the contrastive loss is on
        # Weak: gates of a sequence live as long as its cache does.
        self.kept: weakref.WeakKeyDictionary[Any, dict[str, Gating]] = weakref.WeakKeyDictionary()

    def numbers(self, tasks: Tasks | None) -> Tensor | None:
        """Tasks by name or number as numbers, [] or [B]; None for None.

        Raises ValueError for a name that is unknown, a number out of range, or what is neither.
        """
        if tasks is None or (isinstance(tasks, Tensor) and torch.compiler.is_compiling()):
            return tasks  # a graph cannot branch on values, so that they are not checked there
        if not isinstance(tasks, Tensor):
            if isinstance(tasks, int | str):
                return torch.tensor(self._number(tasks))
            return torch.tensor([self._number(task) for task in tasks], dtype=torch.int64)
        if tasks.is_floating_point() or tasks.is_complex() or tasks.dtype == torch.bool or tasks.ndim > 1:
            raise ValueError(f"tasks: {tasks.dtype} {list(tasks.shape)}; expected whole numbers, one or one per row")
        outside = (tasks < 0) | (tasks >= len(self.tasks))
        if bool(outside.any()):
            raise ValueError(f"tasks: {int(tasks[outside][0])} is none of {self._known()}")
        return tasks.long()

    def _number(self, task: int | str) -> int:
        if isinstance(task, str):
            if task not in self.tasks:
                raise ValueError(f"tasks: {task!r} is none of {self._known()}{nearest(task, self.tasks)}")
            return self.tasks.index(task)
        if isinstance(task, bool) or not isinstance(task, int) or not 0 <= task < len(self.tasks):
            raise ValueError(f"tasks: {task!r} is none of {self._known()}")
        return task

    def _known(self) -> str:
        return f"the {len(self.tasks)} tasks ({', '.join(self.tasks)}; numbers from 0)"

    def begin(self) -> None:
        """Begin a forward of which no more is known than what the caller said."""
        given = self.given
        self.now = Forward(tasks=given.tasks, mask=given.mask, prompt=given.prompt, experts=given.experts)

    def before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The hook: begin a forward. Takes `task` out of the model's arguments.

        Raises ValueError for tasks that do not exist or are not as many as there are rows, and for a cache with tokens
        that this adapter has not seen.
        """
        if self.silent:
            return None
        given = self.given
        named = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args, *kwargs.values())
        batch = next((x for x in named if isinstance(x, Tensor)), None)  # the inputs by name, else any: all have rows
        rows = None if batch is None or batch.ndim == 0 else batch.shape[0]
        tasks = self.numbers(kwargs.get(COLUMN)) if kwargs.get(COLUMN) is not None else given.tasks
        if tasks is not None and tasks.ndim and rows is not None and len(tasks) != rows:
            raise ValueError(
                f"{len(tasks)} tasks were given, and the batch has {rows} rows; give one task, or one per row (with "
                f"beams or several returned sequences, repeat each that often)"
            )
        if tasks is not None and batch is not None:
            tasks = tasks.to(batch.device)
        config = getattr(model, "config", None)
        two_sided = bool(getattr(config, "is_encoder_decoder", False))
        mask = given.mask if given.mask is not None else kwargs.get("attention_mask")
        labels = None if two_sided else kwargs.get("labels")  # of the decoder, and say nothing of the encoder's prompt
        self.now = Forward(
            rows=rows,
            tokens=batch.shape[1] if batch is not None and batch.ndim > 1 else None,
            tasks=tasks,
            mask=mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None,
            prompt=given.prompt,
            labels=labels if isinstance(labels, Tensor) and labels.ndim == 2 else None,
            experts=given.experts,
            two_sided=two_sided,
            share=_share(kwargs.get("labels"), kwargs.get("num_items_in_batch"), given.accumulation),
        )
        cache: Any = kwargs.get("past_key_values")
        if hasattr(cache, "get_seq_length"):
            self.now.continues = cache.get_seq_length() > 0
            # None for a cache that was filled without this adapter: its gates are not known, and a site that needs them
            # raises.
            self.now.kept = self.kept.get(cache) if self.now.continues else self.kept.setdefault(cache, {})
        if any(router.reads == "hidden" for router in self.routers.values()):
            self.silent = True
            try:
                self.now.hidden = self.first_pass(model, args, kwargs)
            finally:
                self.silent = False
        if COLUMN not in kwargs:
            return None
        return args, {name: value for name, value in kwargs.items() if name != COLUMN}

    def losses(self) -> dict[str, float]:
        """Auxiliary losses of the last forward in training by name, each a mean over the sites that have it."""
        by_name: dict[str, list[Tensor]] = {}
        for (name, _), value in self.now.losses.items():
            by_name.setdefault(name, []).append(value.double())
        return {name: float(torch.stack(values).mean()) for name, values in by_name.items()}

    def task_ids(self) -> Tensor:
        """The tasks of the current forward, [] or [B]. Raises ValueError where they were not given."""
        if self.now.tasks is not None:
            return self.now.tasks
        return self._only(None, "this forward")

    def known_task(self) -> Tensor:
        """The one task that the caller has named for everything, []. Raises ValueError where there is none."""
        return self._only(self.given.tasks, "merging")

    def _only(self, tasks: Tensor | None, what: str) -> Tensor:
        if tasks is not None and tasks.ndim == 0:
            return tasks
        if len(self.tasks) == 1 and tasks is None:
            device = next((p.device for p in self.parameters()), None)
            return torch.zeros((), dtype=torch.int64, device=device)
        told = "no task was given" if tasks is None else "several were given"
        raise ValueError(
            f"{what} needs a task, and {told}: say reparam.context(model, tasks=...), or --task, of {self._known()}"
        )


def key(scope: str) -> str:
    """A scope, which is the path of a module, as the name of a submodule."""
    return scope.replace(".", "/") or "model"


def _share(labels: Any, items: Any, accumulation: int) -> Tensor | float:
    """The part of an optimizer's step that this forward is: by its tokens with loss where transformers counts them."""
    if items is None or not isinstance(labels, Tensor):
        return 1 / accumulation
    return labels[..., 1:].ne(-100).sum() / items  # the first token has no loss
