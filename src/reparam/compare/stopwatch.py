"""What a run costs, read off the run itself: seconds of a step, and the most memory that training held."""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import TrainerCallback

from reparam.train.show import Show

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler prints lines of its own otherwise
PROFILED = 1  # the second step: the optimizer's states are there, and shapes are what they stay


class Quiet(Show):
    """Prints nothing, and holds a stopwatch."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True))
        self.watch = Stopwatch()

    def callback(self, steps: int) -> TrainerCallback:
        """The stopwatch."""
        return self.watch


class Stopwatch(TrainerCallback):
    """Times each step from its first forward to the end of the optimizer's, evaluations left out.

    Memory is torch's count of bytes: on a CPU what is held between steps (weights, adapter, optimizer's states) and the
    most that one step, which is profiled and not timed, holds beyond it; on a GPU the allocator's peak.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peak_bytes: int | None = None
        self._began = 0.0
        self._held = 0
        self._profile: torch.profiler.profile | None = None

    @property
    def step_seconds(self) -> float | None:
        """The median, the first step left out; None for a run that made no other."""
        return statistics.median(self.seconds) if self.seconds else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the memory that loading took."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_step_begin(
        self, args: Any, state: Any, control: Any, *, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Begin to time, or to profile."""
        if state.global_step == PROFILED and not torch.cuda.is_available():
            self._held = held_bytes(model, optimizer)
            self._profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            )
            self._profile.start()
        self._began = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End it."""
        if self._profile is not None:
            self._profile.stop()
            self.peak_bytes = self._held + _peak(self._profile)
            self._profile = None
        elif state.global_step > 1:
            self.seconds.append(_now() - self._began)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the allocator."""
        if torch.cuda.is_available():
            self.peak_bytes = torch.cuda.max_memory_allocated()


def held_bytes(model: nn.Module, optimizer: Any) -> int:
    """Bytes of parameters, buffers, gradients and optimizer's states, each memory once."""
    states = getattr(getattr(optimizer, "optimizer", optimizer), "state", {})
    tensors = [t for state in states.values() for t in state.values() if isinstance(t, Tensor)]
    tensors += [t for p in model.parameters() for t in (p, p.grad) if t is not None]
    tensors += list(model.buffers())
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak(profile: torch.profiler.profile) -> int:
    """The most bytes that were held at once beyond those at the start."""
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events: list[Any] = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
