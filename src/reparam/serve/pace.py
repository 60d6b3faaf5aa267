"""Work beside the engine's loop, in small pieces with rests between them.

A step gives Python's lock back at every operation of torch, and waits for it again. So a thread that computes without a
rest, with operations as short as those of reading an adapter, would make each step several times longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.overrides import TorchFunctionMode

PIECE = 0.0005
"""Seconds of work between two rests, at least: a rest is only taken at an operation of torch."""
SHARE = 0.2
"""The share of the time that the thread works."""


class Pace(TorchFunctionMode):
    """A context in which the current thread rests between operations of torch, as long as `busy` returns True."""

    def __init__(self, busy: Callable[[], bool]) -> None:
        super().__init__()
        self._busy = busy
        self._rested = time.thread_time()

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] = {}
    ) -> Any:
        worked = time.thread_time() - self._rested
        if worked > PIECE:
            if self._busy():
                time.sleep(worked * (1 / SHARE - 1))
            self._rested = time.thread_time()
        return func(*args, **(kwargs or {}))
