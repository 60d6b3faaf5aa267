"""Giving memory back to the system while a model is quantized tensor by tensor, so that the process stays as small as
it.

safetensors maps a file, and every page that is read counts as memory of the process until the system takes it back: the
whole file, in the end. The pages are clean copies of it: to forget them costs nothing but reading them again, from the
system's cache, should anybody ask. And the C library keeps what is freed between tensors that stay, for later use: more
than the quantized model itself, when it was measured. Linux only; elsewhere nothing is done.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_DONTNEED = 4  # MADV_DONTNEED of Linux: pages of a private mapping are read from the file again


class Mapped:
    """The mappings that are made of some files after this moment, of which nothing is ever written to.

    Earlier ones are left alone: a model that was loaded from the same file may have been trained in place since, and
    its changes are in its mapping only.
    """

    def __init__(self, files: Iterable[str | os.PathLike[str]]) -> None:
        self.files = {os.path.realpath(file) for file in files}
        self.earlier = self._ranges()

    def forget(self) -> None:
        """Give back the pages that have been read since, and what was allocated and freed."""
        if _libc is None:
            return
        if hasattr(_libc, "malloc_trim"):  # glibc's
            _libc.malloc_trim(0)
        for start, end in self._ranges() - self.earlier:
            _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)

    def _ranges(self) -> set[tuple[int, int]]:
        """Start and end of each private mapping of the files."""
        found = set()
        for line in _MAPS.read_text().splitlines() if self.files and _MAPS.exists() else ():
            where, mode, *_, path = line.split(maxsplit=5)
            if mode.endswith("p") and path in self.files:
                start, _, end = where.partition("-")
                found.add((int(start, 16), int(end, 16)))
        return found


_libc = ctypes.CDLL(None) if _MAPS.exists() else None
