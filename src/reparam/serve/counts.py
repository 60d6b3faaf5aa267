"""What an engine counts, for those who watch it."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType

from reparam.errors import ReparamError
from reparam.serve.tickets import Ticket

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds: the upper bounds of the classes in which steps are counted by their time."""
RECENT = 10.0
"""Seconds over which the rate of tokens is averaged."""


@dataclasses.dataclass(frozen=True)
class Counts:
    """The requests of an adapter, or of the base."""

    requests: int
    prompt_tokens: int
    new_tokens: int


@dataclasses.dataclass(frozen=True)
class Metrics:
    """How an engine does. Numbers without another word count from its start."""

    ready: bool
    """Whether requests are taken."""
    waiting: int
    """Requests that no step has computed yet."""
    running: int
    """Requests in the last step, the batch size; 0 if no request is open."""
    steps: int
    step_seconds: float
    """The time of all steps."""
    step_times: tuple[tuple[float, int], ...]
    """How many steps took up to so many seconds, for each bound. The last bound is infinite."""
    requests: int
    """Requests that were taken."""
    ended: Mapping[str, int]
    """How answers ended: "stop", "length", "cancelled" or "error"."""
    prompt_tokens: int
    cached_tokens: int
    """Tokens of prompts whose keys and values were in the cache."""
    new_tokens: int
    tokens_per_second: float
    """New tokens, over the last 10 seconds."""
    adapters: Mapping[str | None, Counts]
    """By name; None is the base."""
    restarts: int
    """How often the engine started again after a fault."""
    adapters_ready: int
    """Adapters in the tables."""
    adapter_bytes: int
    """The bytes of the tables in use."""
    adapter_loads: int
    """How often an adapter was read and put into the tables."""


class Counters:
    """Counts what happens in an engine. All methods can be called from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._times = [0] * (len(BOUNDS) + 1)
        self._recent: collections.deque[tuple[float, int]] = collections.deque()
        self._new = 0  # tokens since the last step
        self._adapters: dict[str | None, list[int]] = {}
        self._ended: collections.Counter[str] = collections.Counter()
        self.steps = 0
        self.step_seconds = 0.0
        self.cached_tokens = 0
        self.batch = 0

    def taken(self, ticket: Ticket) -> None:
        """A request was taken."""
        with self._lock:
            counts = self._of(ticket)
            counts[0] += 1
            counts[1] += len(ticket.prompt)

    def tokens(self, ticket: Ticket, new: int) -> None:
        """A request is about to get so many tokens."""
        with self._lock:
            self._new += new
            self._of(ticket)[2] += new
            if new and not ticket.tokens:
                self.cached_tokens += ticket.cached

    def ended(self, ticket: Ticket) -> None:
        """A request ended."""
        with self._lock:
            self._ended["error" if isinstance(ticket.ended, ReparamError) else str(ticket.ended)] += 1

    def step(self, seconds: float) -> None:
        """A step was computed."""
        with self._lock:
            self.steps += 1
            self.step_seconds += seconds
            self._times[bisect.bisect_left(BOUNDS, seconds)] += 1
            self._recent.append((self._clock(), self._new))
            self._new = 0
            self._drop_old()

    def metrics(
        self, *, ready: bool, open_requests: int, waiting: int, restarts: int, store: tuple[int, int, int]
    ) -> Metrics:
        """All counts. `store` is the number of adapters in the tables, their bytes, and how often one was loaded."""
        with self._lock:
            self._drop_old()
            so_far = [sum(self._times[: i + 1]) for i in range(len(self._times))]
            adapters = {name: Counts(*counts) for name, counts in self._adapters.items()}
            return Metrics(
                ready=ready,
                waiting=waiting,
                running=self.batch if open_requests else 0,
                steps=self.steps,
                step_seconds=self.step_seconds,
                step_times=tuple(zip((*BOUNDS, float("inf")), so_far, strict=True)),
                requests=sum(counts.requests for counts in adapters.values()),
                ended=MappingProxyType(dict(self._ended)),
                prompt_tokens=sum(counts.prompt_tokens for counts in adapters.values()),
                cached_tokens=self.cached_tokens,
                new_tokens=sum(counts.new_tokens for counts in adapters.values()),
                tokens_per_second=sum(count for _, count in self._recent) / RECENT,
                adapters=MappingProxyType(adapters),
                restarts=restarts,
                adapters_ready=store[0],
                adapter_bytes=store[1],
                adapter_loads=store[2],
            )

    def _of(self, ticket: Ticket) -> list[int]:
        return self._adapters.setdefault(ticket.name, [0, 0, 0])

    def _drop_old(self) -> None:
        while self._recent and self._recent[0][0] < self._clock() - RECENT:
            self._recent.popleft()
