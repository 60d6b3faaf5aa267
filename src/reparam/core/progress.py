"""Long loops tell how far they are. Whoever listens shows it: the command line does, and by default nobody does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

_T = TypeVar("_T")


class Listener(Protocol):
    """Shows waits."""

    def begin(self, what: str, total: int | None, unit: str) -> int:
        """A wait begins: for `total` units of work, or an unknown number. Returns the number of the wait."""

    def advance(self, wait: int, done: int) -> None:
        """So many units of the wait are done."""

    def end(self, wait: int) -> None:
        """The wait is over."""


_listener: ContextVar[Listener | None] = ContextVar("listener of waits", default=None)


@contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """Let `listener` show the waits inside the block; None shows none."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def heard() -> bool:
    """Whether anybody listens."""
    return _listener.get() is not None


@contextmanager
def waiting(what: str, total: int | None = None, *, unit: str = "") -> Iterator[Callable[[int], None]]:
    """A wait for `total` units of work; call the result with the number of units that are done since the last call.

    `what` is a phrase such as "encoding rows".

    >>> with waiting("encoding rows", 20, unit="rows") as advance:
    ...     advance(10)
    """
    listener = _listener.get()
    if listener is None:
        yield lambda count: None
        return
    wait, done = listener.begin(what, total, unit), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        listener.advance(wait, done)

    try:
        yield advance
    finally:
        listener.end(wait)


def tracked(items: Iterable[_T], what: str, *, total: int | None = None, unit: str = "") -> Iterator[_T]:
    """The items, while a wait for them is shown. `total` is their number, if they do not tell it themselves.

    >>> list(tracked([1, 2], "adding", unit="numbers"))
    [1, 2]
    """
    count = len(items) if total is None and isinstance(items, Sized) else total
    with waiting(what, count, unit=unit) as advance:
        for item in items:
            yield item
            advance(1)
