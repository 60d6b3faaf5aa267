"""Stores for pages that are not on the device: a file for the CPU, pinned host memory for a CUDA device.

Transfers run in the background. `exchange` starts to write one page from a buffer and to read another one into it. It
returns a function that waits until the transfers are done or, on CUDA, makes the current stream wait.
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
    """A store of pages by number, all of the same size in bytes."""

    def reserve(self, count: int) -> None:
        """Reserve space for `count` pages in total, so that a lack of space raises now and not during a step."""

    def exchange(self, buffer: Tensor, leaving: int | None, entering: int | None) -> Wait:
        """Start to write the buffer as page `leaving`, then to fill it with page `entering`; either may be None."""

    def read(self, index: int) -> Tensor:
        """A page, uint8 [page] on the CPU, read-only."""


class FileStore:
    """An unnamed temporary file, removed with the store or when the process ends. One thread moves the pages."""

    def __init__(self, page: int, folder: str | os.PathLike[str] | None) -> None:
        self.page = page
        self.folder = os.fspath(folder) if folder is not None else tempfile.gettempdir()
        try:
            file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115  (open as long as the store)
        except OSError as error:
            raise self._refused("create", error) from error
        self._file = file.fileno()
        self._broken: OSError | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="reparam-pages")
        weakref.finalize(self, file.close)

    def reserve(self, count: int) -> None:
        """Reserve disk space for `count` pages in total. Raises OSError if the disk has no room."""
        try:
            os.posix_fallocate(self._file, 0, count * self.page)
        except OSError as error:
            raise self._refused(f"reserve {count * self.page:,} bytes for", error) from error

    def exchange(self, buffer: Tensor, leaving: int | None, entering: int | None) -> Wait:
        """Start the transfers. The returned function raises OSError if writing or reading fails."""
        return self._worker.submit(self._move, buffer, leaving, entering).result

    def read(self, index: int) -> Tensor:
        """Read a page from the file into a new tensor uint8 [page]."""
        buffer = torch.empty(self.page, dtype=torch.uint8)
        self.exchange(buffer, None, index)()
        return buffer

    def _move(self, buffer: Tensor, leaving: int | None, entering: int | None) -> None:
        if self._broken is not None:
            raise self._broken  # a page is lost, so continuing would change the training
        data = buffer.numpy().data
        try:
            if leaving is not None:
                self._whole(os.pwrite, data, leaving)
            if entering is not None:
                self._whole(lambda file, rest, at: os.preadv(file, [rest], at), data, entering)
        except OSError as error:
            self._broken = self._refused(
                "write or read", error, "; then resume from a checkpoint, as a step was interrupted"
            )
            raise self._broken from error

    def _whole(self, call: Callable[[int, memoryview, int], int], data: memoryview, index: int) -> None:
        done = 0
        while done < self.page:  # the system may transfer fewer bytes than requested
            moved = call(self._file, data[done:], index * self.page + done)
            if not moved:
                raise OSError(f"page {index} ends after {done} of {self.page} bytes")
            done += moved

    def _refused(self, verb: str, error: OSError, then: str = "") -> OSError:
        return OSError(
            error.errno,
            f"cannot {verb} the file of the optimizer's pages in {self.folder} ({error.strerror or error}): free some "
            f"space there, choose another folder, or raise the budget{then}",
        )


class PinnedStore:
    """Page-locked (pinned) host memory. Copies run on a separate CUDA stream, in parallel with the updates."""

    def __init__(self, page: int, device: torch.device) -> None:
        self.page = page
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pages: list[Tensor] = []

    def reserve(self, count: int) -> None:
        """Allocate host memory for `count` pages in total. Raises RuntimeError if there is too little."""
        for _ in range(count - len(self._pages)):
            self._pages.append(torch.empty(self.page, dtype=torch.uint8, pin_memory=True))

    def exchange(self, buffer: Tensor, leaving: int | None, entering: int | None) -> Wait:
        """Start the copies after all work on the current stream; the returned function does not block the host."""
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
        """The stored page itself, after all copies have finished."""
        self._stream.synchronize()
        return self._pages[index]


def make_store(page: int, device: torch.device, folder: str | os.PathLike[str] | None) -> Store:
    """The store for the pages of a device. Raises ValueError unless it is a CPU or a CUDA device."""
    if device.type == "cpu":
        return FileStore(page, folder)
    if device.type == "cuda":
        return PinnedStore(page, device)
    raise ValueError(f"pages on {device} cannot be moved: leave budget out, or keep the parameters on cpu or cuda")
