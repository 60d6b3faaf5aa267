"""A listener that records the waits of a block."""

from __future__ import annotations


class Heard:
    """The waits by what they are for: units in all, and units that are done."""

    def __init__(self) -> None:
        self.waits: dict[str, tuple[int | None, int]] = {}
        self._names: list[str] = []

    def begin(self, what: str, total: int | None, unit: str) -> int:
        self.waits[what] = (total, 0)
        self._names.append(what)
        return len(self._names) - 1

    def advance(self, wait: int, done: int) -> None:
        total, _ = self.waits[self._names[wait]]
        self.waits[self._names[wait]] = (total, done)

    def end(self, wait: int) -> None: ...
