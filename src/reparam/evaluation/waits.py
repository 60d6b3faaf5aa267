"""Waits on a terminal: a bar with the time left. Elsewhere: one line for each wait of more than two seconds."""

from __future__ import annotations

import dataclasses
import threading
import time

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from reparam.core.text import visible
from reparam.evaluation.terminal import say

SHOWN = 0.5  # seconds after which a bar appears on a terminal
TOLD = 2.0  # seconds after which a line is printed elsewhere


@dataclasses.dataclass
class _Wait:
    what: str
    total: int | None
    unit: str
    began: float
    timer: threading.Timer
    done: int = 0
    due: bool = False
    task: TaskID | None = None


class Waits:
    """Shows the waits of `reparam.core.progress` on a console.

    A wait that begins inside another one is shown beside it. A wait begun by `opening` ends when another one begins.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = console.is_terminal
        self._waits: dict[int, _Wait] = {}
        self._bars: Progress | None = None
        self._opened: int | None = None
        self._next = 0
        self._lock = threading.RLock()

    def opening(self, what: str) -> None:
        """Begin a wait that ends when the next one begins, or with `close`."""
        self._opened = self.begin(what, None, "")

    def close(self) -> None:
        """End all waits."""
        for wait in list(self._waits):
            self.end(wait)

    def begin(self, what: str, total: int | None, unit: str) -> int:
        """Begin a wait for `total` units of work. Returns its number."""
        opened, self._opened = self._opened, None
        if opened is not None:
            self.end(opened)
        with self._lock:
            self._next += 1
            number = self._next
            timer = threading.Timer(SHOWN if self.live else TOLD, self._show, (number,))
            timer.daemon = True
            self._waits[number] = _Wait(what, total, unit, time.monotonic(), timer)
            timer.start()
        return number

    def advance(self, wait: int, done: int) -> None:
        """So many units of the wait are done."""
        with self._lock:
            if (found := self._waits.get(wait)) is None:
                return
            found.done = done
            self._tell(found)
            if self._bars is not None and found.task is not None:
                self._bars.update(found.task, completed=done, count=_count(found))

    def end(self, wait: int) -> None:
        """The wait is over: remove its bar."""
        with self._lock:
            if (found := self._waits.pop(wait, None)) is None:
                return
            found.timer.cancel()
            if self._bars is not None and found.task is not None:
                self._bars.remove_task(found.task)
                if not self._bars.tasks:
                    self._bars.stop()
                    self._bars = None

    def _tell(self, wait: _Wait) -> None:
        """Print the line of a wait that is due, once it can tell the time left."""
        if wait.due and (wait.done or wait.total is None):
            wait.due = False
            say(self.console, _line(wait))

    def _show(self, wait: int) -> None:
        with self._lock:
            if (found := self._waits.get(wait)) is None:
                return
            if not self.live:
                found.due = True
                self._tell(found)
                return
            if self._bars is None:
                self._bars = _bars(self.console)
                self._bars.start()
            found.task = self._bars.add_task(
                visible(found.what), total=found.total, completed=found.done, count=_count(found)
            )


class _Known(ProgressColumn):
    """A column that is empty while the amount of work is unknown."""

    def __init__(self, column: ProgressColumn) -> None:
        super().__init__()
        self.column = column

    def render(self, task: Task) -> RenderableType:
        """Render the column for one wait."""
        return self.column.render(task) if task.total is not None else ""


def _bars(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        _Known(BarColumn()),
        TextColumn("{task.fields[count]}", markup=False),
        TimeElapsedColumn(),
        _Known(TimeRemainingColumn()),
        console=console,
        transient=True,
        refresh_per_second=5,
    )


def _count(wait: _Wait) -> str:
    """How much is done, such as "20 of 100 rows"."""
    if wait.total is None:
        return f"{wait.done:,} {wait.unit}".strip() if wait.done else ""
    return f"{wait.done:,} of {wait.total:,} {wait.unit}".strip()


def _line(wait: _Wait) -> str:
    """The line about a wait, with the time left if it can be told."""
    text = f"{wait.what} ..."
    if count := _count(wait):
        text += f"  {count}"
    if wait.total is not None and wait.done:
        left = (time.monotonic() - wait.began) / wait.done * (wait.total - wait.done)
        text += f", about {max(1, round(left)):,} s left"
    return text
