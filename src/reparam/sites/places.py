"""Which rows of a table each slot has: a slot gets consecutive rows, and free rows are used again."""

from __future__ import annotations


class Places:
    """The rows of a table of `size` rows, by slot.

    >>> places = Places(8)
    >>> places.take("a", 3), places.take("b", 2), places.take("c", 4)
    (range(0, 3), range(3, 5), None)
    >>> places.free("a")
    >>> places.take("c", 2), places.used
    (range(0, 2), 4)
    """

    def __init__(self, size: int = 0) -> None:
        self.size = size
        self.by_slot: dict[object, range] = {}

    @property
    def used(self) -> int:
        """The number of rows that slots have."""
        return sum(map(len, self.by_slot.values()))

    def of(self, slot: object) -> range:
        """The rows of a slot; an empty range if it has none."""
        return self.by_slot.get(slot, range(0))

    def take(self, slot: object, count: int) -> range | None:
        """Give the first `count` free rows that are together to a slot that has none. None if there are not so many."""
        start = self._first(count)
        if start is None:
            return None
        self.by_slot[slot] = range(start, start + count)
        return self.by_slot[slot]

    def has_room(self, count: int) -> bool:
        """Whether `take` would find so many rows."""
        return self._first(count) is not None

    def _first(self, count: int) -> int | None:
        start = 0
        for rows in sorted(self.by_slot.values(), key=lambda rows: rows.start):
            if rows.start - start >= count:
                break
            start = rows.stop
        return start if start + count <= self.size else None

    def free(self, slot: object) -> None:
        """Take the rows of a slot back."""
        self.by_slot.pop(slot, None)

    def pack(self, size: int) -> list[tuple[range, range]]:
        """Put all rows together, in a table of `size` rows. Returns where rows were, and where they go."""
        moves, start = [], 0
        for slot, rows in sorted(self.by_slot.items(), key=lambda item: item[1].start):
            self.by_slot[slot] = range(start, start + len(rows))
            moves.append((rows, self.by_slot[slot]))
            start += len(rows)
        self.size = size
        return moves
