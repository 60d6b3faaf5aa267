"""Where pages are when they are not on the device: a file for the CPU, pinned host memory for a CUDA device.

Both move in the background. `exchange` starts to move one page out of a buffer and another one into it, and gives
a function that waits for the end, or on CUDA makes the current stream wait.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

Wait = Callable[[], object]


class Store(Protocol):
    """Pages by number, all of one size in bytes."""

    def reserve(self, count: int) -> None:
        """Make room for `count` pages in all, so that its lack is an error now and not in the middle of a step."""

    def exchange(self, buffer: Tensor, leaving: int | None, entering: int | None) -> Wait:
        """Write the buffer as page `leaving`, then fill it with page `entering`; either may be None."""

    def read(self, index: int) -> Tensor:
        """A page on the CPU, uint8 [page], to be read only."""


class FileStore:
    """A file without a name, that is gone with the store or the process, however that ends; one thread moves pages."""

    def __init__(self, page: int, folder: str | os.PathLike[str] | None) -> None:
        self.page = page
        self.folder = os.fspath(folder) if folder is not None else tempfile.gettempdir()
        try:
            file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115  (lives as long as this)
        except OSError as error:
            raise self._refused("make", error) from error
        self._file = file.fileno()
        self._broken: OSError | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="reparam-pages")
        weakref.finalize(self, file.close)

    def reserve(self, count: int) -> None:
        """Raises OSError when the disk has no room."""
        try:
            os.posix_fallocate(self._file, 0, count * self.page)
        except OSError as error:
            raise self._refused(f"reserve {count * self.page:,} bytes for", error) from error

    def exchange(self, buffer: Tensor, leaving: int | None, entering: int | None) -> Wait:
        """The wait raises OSError when the system refuses to write or read."""
        return self._worker.submit(self._move, buffer, leaving, entering).result

    def read(self, index: int) -> Tensor:
        """A new tensor."""
        buffer = torch.empty(self.page, dtype=torch.uint8)
        self.exchange(buffer, None, index)()
        return buffer

    def _move(self, buffer: Tensor, leaving: int | None, entering: int | None) -> None:
        if self._broken is not None:
            raise self._broken  # a page is missing: going on without it would be another training
        data = buffer.numpy().data
        try:
            if leaving is not None:
                self._whole(os.pwrite, data, leaving)
            if entering is not None:
                self._whole(lambda file, rest, at: os.preadv(file, [rest], at), data, entering)
        except OSError as error:
            self._broken = self._refused("write or read", error, "; then go on from a checkpoint: a step was cut short")
            raise self._broken from error

    def _whole(self, call: Callable[[int, memoryview, int], int], data: memoryview, index: int) -> None:
        done = 0
        while done < self.page:  # the system may move less than it was asked to
            moved = call(self._file, data[done:], index * self.page + done)
            if not moved:
                raise OSError(f"page {index} ends after {done} of {self.page} bytes")
            done += moved

    def _refused(self, verb: str, error: OSError, then: str = "") -> OSError:
        return OSError(
            error.errno,
            f"cannot {verb} the file for the optimizer's pages in {self.folder} ({error.strerror or error}): free some "
            f"space there, choose another folder, or raise the budget{then}",
        )


class PinnedStore:
    """Page-locked host memory; copies run on a stream of their own beside the updates."""

    def __init__(self, page: int, device: torch.device) -> None:
        self.page = page
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pages: list[Tensor] = []

    def reserve(self, count: int) -> None:
        """Raises RuntimeError when the host has no room."""
        for _ in range(count - len(self._pages)):
            self._pages.append(torch.empty(self.page, dtype=torch.uint8, pin_memory=True))

    def exchange(self, buffer: Tensor, leaving: int | None, entering: int | None) -> Wait:
        """Starts after everything that was asked of the current stream so far; the wait does not block the host."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        buffer.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            if leaving is not None:
                self._pages[leaving].copy_(buffer, non_blocking=True)
            if entering is not None:
                buffer.copy_(self._pages[entering], non_blocking=True)
            done = self._stream.record_event()
        return lambda: torch.cuda.current_stream(self._device).wait_event(done)

    def read(self, index: int) -> Tensor:
        """The page itself, once the copies have ended."""
        self._stream.synchronize()
        return self._pages[index]


def make_store(page: int, device: torch.device, folder: str | os.PathLike[str] | None) -> Store:
    """The store beside a device. Raises ValueError for one that has none."""
    if device.type == "cpu":
        return FileStore(page, folder)
    if device.type == "cuda":
        return PinnedStore(page, device)
    raise ValueError(f"pages of {device} have nowhere to go: leave budget out, or keep parameters on cpu or cuda")
