"""State that all sites of one mixture share: routers of a scope wider than a module, and the current forward pass.

While the adapter is selected, `Common.before_forward` is a forward pre-hook of the model's root. For each forward pass
it makes a new `Forward` from the model's arguments (`attention_mask`, `labels`, a cache, `task`) and from the values of
`reparam.context`. Sites read it, and write their gates and losses into it, not into modules. It stays until the next
forward pass, because gradient checkpointing computes sites again during the backward pass.

Shapes: B rows of a batch, L tokens of a row, N experts, H width of the hidden states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reparam.core.checks import nearest
from reparam.core.surface import advice
from reparam.methods.mixture.routers import Router
from reparam.methods.mixture.select import Gating
from reparam.methods.mixture.two_pass import ByCache, FirstPass

Tasks = int | str | Sequence[int | str] | Tensor
COLUMN = "task"
"""Keyword argument of the model for tasks: a name or number, or one per row [B]. It is not passed on to the model."""


@dataclasses.dataclass(frozen=True)
class Given:
    """Values from `reparam.context` for the next forward passes; None for those that are not set."""

    tasks: Tensor | None = None  # [] or [B] int64
    mask: Tensor | None = None  # [B, L] bool, True for tokens that are not padding
    prompt: Tensor | None = None  # [] or [B] int64, number of prompt tokens of a row, without padding
    experts: Tensor | None = None  # [N] bool, the experts that may be used
    accumulation: int = 1  # forward passes per optimizer step


@dataclasses.dataclass(eq=False)
class Forward:
    """The inputs of one forward pass that sites need, and the gates and losses that they have computed so far."""

    rows: int | None = None  # B
    tokens: int | None = None  # L
    tasks: Tensor | None = None  # as in `Given`, like mask, prompt and experts
    mask: Tensor | None = None
    prompt: Tensor | None = None
    labels: Tensor | None = None  # [B, L] int64, -100 for tokens without a loss
    experts: Tensor | None = None
    share: Tensor | float = 1.0
    """Factor of auxiliary losses: the share of this forward pass in the optimizer step, from 0 to 1."""
    hidden: Tensor | None = None
    """The last hidden states of the base model, [B, L, H]."""
    kept: dict[str, Gating] | None = None
    """Gates of whole sequences by scope or site, stored with the KV cache that the model was called with."""
    continues: bool = False
    """Whether the KV cache holds tokens of earlier forward passes."""
    gates: dict[str, Gating] = dataclasses.field(default_factory=dict)
    losses: dict[tuple[str, str], Tensor] = dataclasses.field(default_factory=dict)
    calls: dict[tuple[str, bool], int] = dataclasses.field(default_factory=dict)
    """How often each site was computed: (site, whether during a backward pass) -> count."""
    two_sided: bool = False
    """Whether the model is an encoder-decoder, whose two sequences differ in length."""

    def __reduce__(self) -> Any:
        return Forward, ()  # a copied model is outside of a forward pass, and tensors in a graph cannot be copied

    def recompute(self, site: str) -> None:
        """Count a computation of a site; RuntimeError if a backward pass computes it for an earlier forward pass."""
        if torch.compiler.is_compiling():
            return
        backward = torch._C._current_graph_task_id() != -1  # torch has no public function for this
        self.calls[site, backward] = self.calls.get((site, backward), 0) + 1
        if backward and self.calls[site, True] > self.calls.get((site, False), 0):
            raise RuntimeError(
                f"{site}: gradient checkpointing recomputed it for an earlier forward pass, whose tasks and masks are "
                f"no longer known; call backward after each forward pass"
            )

    def spread(self, gates: Tensor, lead: torch.Size) -> Tensor:
        """Reshape gates [N], [B, N] or [*lead, N] to broadcast to [*lead, N]. Raises ValueError if they do not fit."""
        if gates.ndim == 1 or gates.shape[:-1] == lead:
            return gates
        rows = len(gates)
        # Gates of rows, for an activation [B, L, I] or, as in MoE blocks, [B L, I].
        if gates.ndim == 2 and lead and lead[0] == rows:
            return gates.view(rows, *[1] * (len(lead) - 1), -1)
        if gates.ndim == 2 and len(lead) == 1 and self.tokens is not None and lead[0] == rows * self.tokens:
            return gates.repeat_interleave(self.tokens, 0)
        if gates.shape[:-1].numel() == lead.numel():
            return gates.reshape(*lead, -1)
        raise ValueError(
            f"gates of shape {list(gates.shape)} do not fit an activation of shape {[*lead, '...']}: either its rows "
            f"cannot be identified, or the gates belong to another sequence"
        )

    def by_row(self, z: Tensor) -> Tensor:
        """z [..., I] as [B, L, I]. A single vector [I] is one row of one token."""
        if z.ndim == 1:
            return z[None, None]
        if z.ndim == 2 and self.rows is not None and self.tokens is not None and len(z) == self.rows * self.tokens:
            return z.view(self.rows, self.tokens, -1)
        return z[:, None] if z.ndim == 2 else z.flatten(1, -2)

    def valid(self, lead: torch.Size) -> Tensor | None:
        """Which tokens of an activation [*lead, I] are not padding, bool [*lead]; None if there is no mask.

        In an encoder-decoder the mask belongs to the encoder: where it does not fit, all tokens count (None).
        Raises ValueError if the mask does not fit the activation of another model.
        """
        mask = self.mask
        if mask is None:
            return None
        # With a cache the mask also covers earlier tokens, but the activation has only the new ones.
        if len(lead) == 2 and mask.shape[0] == lead[0] and self.continues:
            mask = mask[:, -lead[1] :]
        if mask.shape != lead and mask.numel() != lead.numel():
            if self.two_sided:
                return None
            raise ValueError(
                f"the attention mask has shape {list(mask.shape)}, but an activation has {list(lead)} tokens; pass a "
                f"mask for these tokens with reparam.context(model, mask=...)"
            )
        return mask.reshape(lead)

    def pool(self, lead: torch.Size, over: str, device: torch.device) -> Tensor:
        """Which tokens of sequences a sequence router may read, bool [B, L]: all but padding, or only the prompt's.

        Raises ValueError if `over` is "prompt" and the prompt is unknown.
        """
        valid = self.valid(lead)
        valid = torch.ones(lead, dtype=torch.bool, device=device) if valid is None else valid
        if over == "all":
            return valid
        if self.prompt is not None:
            return valid & (valid.cumsum(1) <= self.prompt.to(device).view(-1, 1))
        if self.labels is not None and self.labels.shape == lead:
            # A label at i is predicted from the tokens before i. The tokens before the first label are the prompt.
            answered = self.labels.ne(-100)
            answered[:, 0] = False  # no token precedes the first one, so that its label is not used
            return valid & (answered.cumsum(1) == 0)
        if self.kept is not None:  # generation: the first forward pass with a cache holds the prompt
            return valid
        raise ValueError(
            "router 'sequence' reads the prompt only, and the prompt's length is unknown: train with labels, generate "
            "with a cache, or use reparam.context(model, prompt=lengths). pool='all' reads every token instead, which "
            "in a causal model leaks later tokens to earlier positions"
        )


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
        tasks = self.numbers(kwargs.get(COLUMN)) if kwargs.get(COLUMN) is not None else given.tasks
        if tasks is not None and tasks.ndim and rows is not None and len(tasks) != rows:
            raise ValueError(
                f"{len(tasks)} tasks were given, but the batch has {rows} rows; give one task, or one per row (repeat "
                f"each task for each of its beams or returned sequences)"
            )
        if tasks is not None and batch is not None:
            tasks = tasks.to(batch.device)
        config = getattr(model, "config", None)
        two_sided = bool(getattr(config, "is_encoder_decoder", False))
        mask = given.mask if given.mask is not None else kwargs.get("attention_mask")
        labels = None if two_sided else kwargs.get("labels")  # the decoder's labels do not show the encoder's prompt
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
            # None for a cache that was filled without this adapter. A site that needs its gates then raises an error.
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
