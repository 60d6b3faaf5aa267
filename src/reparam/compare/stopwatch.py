"""Measure a training run while it runs: median seconds of a step, and peak memory in bytes."""

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

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # without this, the profiler prints log lines
PROFILED = 1  # index of the profiled step: at the second step, optimizer states exist and shapes no longer change


class Quiet(Show):
    """Show a training run by printing nothing, and measure it with a `Stopwatch`."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True))
        self.watch = Stopwatch()

    def callback(self, steps: int) -> TrainerCallback:
        """Return the stopwatch, which takes the place of the callback that prints progress."""
        return self.watch


class Stopwatch(TrainerCallback):
    """Time each training step, from the first forward pass to the end of the optimizer step, without evaluations.

    On a GPU, peak memory is the peak of torch's allocator. On a CPU it is the bytes that are held between steps
    (weights, adapter, optimizer states) plus the peak of additional bytes within one step. That step is profiled and
    not timed.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peak_bytes: int | None = None
        self._began = 0.0
        self._held = 0
        self._profile: torch.profiler.profile | None = None

    @property
    def step_seconds(self) -> float | None:
        """Median seconds of the timed steps; the first step is not timed. None if no step was timed."""
        return statistics.median(self.seconds) if self.seconds else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reset the GPU's peak memory, so that loading the model does not count."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_step_begin(
        self, args: Any, state: Any, control: Any, *, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Start the clock and, at the profiled step on a CPU, the profiler."""
        if state.global_step == PROFILED and not torch.cuda.is_available():
            self._held = held_bytes(model, optimizer)
            self._profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            )
            self._profile.start()
        self._began = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the profiler and compute the peak, or record the seconds of the step."""
        if self._profile is not None:
            self._profile.stop()
            self.peak_bytes = self._held + _peak(self._profile)
            self._profile = None
        elif state.global_step > 1:
            self.seconds.append(_now() - self._began)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the peak of the GPU's allocator."""
        if torch.cuda.is_available():
            self.peak_bytes = torch.cuda.max_memory_allocated()


def held_bytes(model: nn.Module, optimizer: Any) -> int:
    """Bytes of parameters, buffers, gradients and optimizer states; shared memory is counted once."""
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
    """Peak of the bytes that were allocated while the profiler ran, beyond those held at its start."""
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events: list[Any] = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
