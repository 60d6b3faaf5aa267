"""A pager: pages of a fixed size in bytes, a limited number of them on a device and the others in a store.

The least recently used page is evicted (LRU). A page that was never used is all zeros and needs no transfer. Every page
that is requested counts as changed, so every evicted page is written to the store.
"""

from __future__ import annotations

import dataclasses
import os
from collections import OrderedDict

import torch
from torch import Tensor

from reparam.optim.store import Store, Wait, make_store


@dataclasses.dataclass(frozen=True)
class Paging:
    """Counters of a pager. All but `peak_resident` and `total` are cumulative."""

    faults: int = 0
    """Pages that were read from the store while an update waited for them."""
    prefetched: int = 0
    """Pages that were read from the store ahead of their update."""
    evictions: int = 0
    """Pages that were moved from the device to the store."""
    bytes_in: int = 0
    """Bytes that were read from the store."""
    bytes_out: int = 0
    """Bytes that were written to the store."""
    peak_resident: int = 0
    """The largest number of bytes on the device at any time; at most the budget."""
    total: int = 0
    """Bytes of all pages, on the device and in the store."""


class Pager:
    """Access to pages by number; each page is uint8 [page].

    Args:
        page: bytes of a page.
        slots: the maximum number of pages on the device, at least 1; None for no limit.
        device: the device on which pages are used.
        folder: the folder of the page file of a CPU; by default the system's temporary folder.

    >>> pager = Pager(4, slots=1, device=torch.device("cpu"))
    >>> pager.grow(2)
    >>> for index in (0, 1, 0):
    ...     page = pager.page(index).add_(1)
    >>> page.tolist(), pager.paging.faults, pager.paging.bytes_out
    ([2, 2, 2, 2], 1, 8)
    """

    def __init__(
        self, page: int, *, slots: int | None, device: torch.device, folder: str | os.PathLike[str] | None = None
    ) -> None:
        assert slots is None or slots > 0, slots
        self.device = device
        self._page, self._slots, self._folder = page, slots, folder
        self._resident: OrderedDict[int, Tensor] = OrderedDict()  # least recently used first
        self._arriving: dict[int, Wait] = {}
        self._written: set[int] = set()
        self._store: Store | None = None
        self._count = self._faults = self._prefetched = self._evictions = self._peak = 0

    @property
    def paging(self) -> Paging:
        """The counters so far."""
        faults, ahead, evictions, page = self._faults, self._prefetched, self._evictions, self._page
        moved = (faults + ahead) * page, evictions * page
        return Paging(faults, ahead, evictions, *moved, self._peak * page, self._count * page)

    def grow(self, count: int) -> None:
        """Set the total number of pages. Raises OSError if the page file has no room for those beyond the budget."""
        if self._slots is not None and count > self._slots:
            self._store = self._store or make_store(self._page, self.device, self._folder)
            self._store.reserve(count)
        self._count = count

    def page(self, index: int) -> Tensor:
        """The page, to be read and changed until another one is requested. Raises OSError if a transfer fails."""
        assert index < self._count, (index, self._count)
        if index not in self._resident:
            if index in self._written:
                self._fetch(index)
                self._faults += 1
            else:
                buffer, leaving = self._room()
                if leaving is not None:
                    self._move(buffer, leaving, None)()
                self._resident[index] = buffer.zero_()
        self._settle(index)
        self._resident.move_to_end(index)
        return self._resident[index]

    def prefetch(self, index: int) -> None:
        """Start to read the page that will be requested next. The page that was requested last stays on the device."""
        if index in self._written and index not in self._resident and self._slots != 1:
            self._fetch(index)
            self._prefetched += 1

    def peek(self, index: int) -> Tensor:
        """The page, read-only, without changing which pages are on the device or the counters."""
        if index in self._resident:
            self._settle(index)
            return self._resident[index]
        if index in self._written and self._store is not None:
            return self._store.read(index)
        return torch.zeros(self._page, dtype=torch.uint8)

    def _fetch(self, index: int) -> None:
        buffer, leaving = self._room()
        self._arriving[index] = self._move(buffer, leaving, index)
        self._resident[index] = buffer

    def _room(self) -> tuple[Tensor, int | None]:
        """A buffer for a page, and the number of the page in it that must be evicted, or None."""
        if self._slots is None or len(self._resident) < self._slots:
            self._peak = max(self._peak, len(self._resident) + 1)
            return torch.empty(self._page, dtype=torch.uint8, device=self.device), None
        leaving = next(iter(self._resident))
        self._settle(leaving)
        return self._resident.pop(leaving), leaving

    def _move(self, buffer: Tensor, leaving: int | None, entering: int | None) -> Wait:
        assert self._store is not None
        if leaving is not None:
            self._written.add(leaving)
            self._evictions += 1
        return self._store.exchange(buffer, leaving, entering)

    def _settle(self, index: int) -> None:
        """Wait for the transfer of a page, if one is in progress."""
        if (wait := self._arriving.pop(index, None)) is not None:
            wait()
