"""The memory of a training run, beside the run: its plan before the first step, and what its longest batch holds."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from reparam.core.memory import lacks_memory
from reparam.core.text import sized
from reparam.data.preferences import flat
from reparam.plan.device import memory
from reparam.plan.estimate import Plan, advised, plan
from reparam.plan.live import Live
from reparam.plan.longest import longest, longest_text
from reparam.train.job import Job
from reparam.train.optimizer import paging
from reparam.train.show import Show
from reparam.train.state import random_state, set_random_state
from reparam.train.trainer import Resumable


@dataclasses.dataclass(frozen=True)
class Held:
    """What a training step held at its peak."""

    rows: int
    tokens: int
    """Tokens of each row of the batch, with its padding."""
    parts: Mapping[str, int]
    """Bytes by what they are for. On a GPU there is one part, what the allocator gave out."""


class Watch(TrainerCallback):
    """Plans the memory of a run, tries its longest batch before the first step, and compares the two at the end.

    Give it to `reparam.train.run.train` as `watch`. It changes nothing of the run: the random numbers go on where they
    were, and no gradient is left. On a CPU, the bytes of all live tensors of the trial are counted; on a GPU, those
    that the allocator has given out since the run began.
    """

    def __init__(self, show: Show) -> None:
        self.show = show
        self.plan: Plan | None = None
        self.held: Held | None = None
        self._job: Job | None = None
        self._live: Live | None = None

    def __call__(self, job: Job, trainer: Resumable) -> Watch:
        """Print the plan of a run that is about to begin."""
        self._job, self._trainer = job, trainer
        if job.config.run.objective != "sft":
            self.show.note(f"the memory of a run with the objective {job.config.run.objective} is not planned")
            return self
        if job.config.run.task == "causal":
            self._longest = longest(job.config, flat(job.train), job.packed)
        else:
            self._longest = longest_text(job.config, job.train.report.longest)
        try:
            with _aside():
                self.plan = plan(job.config, self._longest, limit=memory()[1], sizes=False)
        except Exception as error:  # of tracing a model of any kind: the run does not depend on its plan
            self.show.note(f"the memory of this run cannot be planned: {_line(error)}")
            return self
        self._planned(self.plan)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, *, model: Any = None, **kwargs: Any
    ) -> None:
        """Try the longest batch: a forward and a backward pass."""
        if self.plan is None or not self._longest.which or state.global_step >= state.max_steps:
            return
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            with _aside():
                self.held = self._tried(model)
        except Exception as error:
            if lacks_memory(error):
                raise
            self.show.note(f"the longest batch could not be tried: {_line(error)}")
        finally:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = None

    def on_step_end(
        self, args: TrainingArguments, state: Any, control: Any, *, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Add the states of the optimizer, which it makes in its first step."""
        if self.held is not None and "optimizer" not in self.held.parts and not torch.cuda.is_available():
            states = {"optimizer": _states(optimizer)}
            self.held = dataclasses.replace(self.held, parts={**self.held.parts, **states})

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the plan and what was held."""
        if self.plan is None or self.held is None:
            return
        if torch.cuda.is_available():
            self.held = dataclasses.replace(self.held, parts={"allocated": torch.cuda.max_memory_allocated()})
        peak, held = self.plan.peak.total, sum(self.held.parts.values())
        self.show.told(
            f"memory         {sized(held)} held by the longest batch, {self.held.rows} x {self.held.tokens} tokens; "
            f"{sized(peak)} planned ({peak / held - 1:+.1%})",
            "memory_held",
            held=held,
            **dataclasses.asdict(self.held),
        )

    def explain(self, error: BaseException) -> None:
        """Add to an error of lacking memory: the plan, what was held, and the settings that lower it."""
        if self._job is None or self.plan is None or not lacks_memory(error):
            return
        found = f"the plan for {self.plan.batch} is {sized(self.plan.peak.total)}"
        if held := self._now():
            found += f", and {sized(held)} were held"
        error.add_note(found)
        with contextlib.suppress(Exception), _aside():
            for change in advised(self._job.config, self.plan):
                error.add_note(f"with {change.key} {change.said}, it is {sized(change.peak)}")

    def _planned(self, made: Plan) -> None:
        most = sorted(made.peak.parts.items(), key=lambda part: -part[1])[:3]
        there = "" if made.limit is None else f"; there are {sized(made.limit)}"
        self.show.told(
            f"memory         {sized(made.peak.total)} planned at the peak of a step of {made.batch}{there}; "
            f"most for {', '.join(f'{name} {sized(size)}' for name, size in most)}",
            "memory_plan",
            rows=made.batch.rows,
            tokens=made.batch.tokens,
            peak=made.peak.total,
            parts=dict(made.peak.parts),
            limit=made.limit,
            changes=[{"key": change.key, "value": change.value, "peak": change.peak} for change in made.changes],
        )
        if made.fits is False:
            lower = "".join(f"; with {change.key} {change.said}, {sized(change.peak)}" for change in made.changes)
            self.show.note(f"the planned peak is above the memory of the device, so the run will probably fail{lower}")

    def _now(self) -> int:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        return sum(self.held.parts.values()) if self.held is not None else self._live.peak if self._live else 0

    def _tried(self, model: nn.Module) -> Held:
        """A forward and a backward pass of the rows that are longest."""
        job, trainer = self._job, self._trainer
        assert job is not None
        dataset = job.packed or flat(job.train)
        batch = trainer.data_collator([dataset[row] for row in self._longest.which])
        batch.pop("row", None)
        rows, tokens = batch["input_ids"].shape
        self._live = live = Live(model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
        live.hold([*model.parameters(), *model.buffers()], "weights")
        live.hold(job.adapter.parameters(), "adapter")
        model.train()
        with contextlib.ExitStack() as held:
            if not torch.cuda.is_available():
                held.enter_context(live)
            for parameter in job.adapter.parameters():
                held.callback(live.gradient(parameter).remove)
            inputs = trainer._prepare_inputs(batch)
            with trainer.compute_loss_context_manager():
                loss: Any = transformers.Trainer.compute_loss(trainer, model, inputs)
                penalty = job.adapter.penalty()
                loss = loss if penalty is None else loss + penalty
            loss.backward()
        return Held(rows, tokens, {name: size for name, size in live.parts.items() if size > 0})


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """Restore the random generators afterwards."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


def _states(optimizer: Any) -> int:
    """Bytes of an optimizer's states on the device."""
    if (paged := paging(optimizer)) is not None:
        return paged.peak_resident
    inner = getattr(optimizer, "optimizer", optimizer)
    held = [value for state in inner.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in held)


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).split("\n")[0]
