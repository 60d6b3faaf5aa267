"""Release memory while a model is quantized tensor by tensor, to keep the process about as small as that model.

safetensors memory-maps its file. Every page that is read counts as resident memory of the process until the kernel
reclaims it, in the end the size of the whole file. The pages are clean, so dropping them is safe: a later access reads
them again, usually from the page cache. The C library also keeps freed blocks between live tensors, which measured more
than the quantized model itself. Linux only; on other systems nothing happens.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_DONTNEED = 4  # Linux's MADV_DONTNEED: the next access to a page of a private mapping reads the file again


class Mapped:
    """The private mappings of the given files that are created after this object. Nothing may write to them.

    Earlier mappings are left alone. They may belong to a model that was trained in place after loading, and only the
    mapping holds its changes.
    """

    def __init__(self, files: Iterable[str | os.PathLike[str]]) -> None:
        self.files = {os.path.realpath(file) for file in files}
        self.earlier = self._ranges()

    def forget(self) -> None:
        """Release the pages that these mappings have read, and the heap memory that was freed."""
        if _libc is None:
            return
        if hasattr(_libc, "malloc_trim"):  # only in glibc
            _libc.malloc_trim(0)
        for start, end in self._ranges() - self.earlier:
            _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)

    def _ranges(self) -> set[tuple[int, int]]:
        """Start and end address of each private mapping of the files."""
        found = set()
        for line in _MAPS.read_text().splitlines() if self.files and _MAPS.exists() else ():
            where, mode, *_, path = line.split(maxsplit=5)
            if mode.endswith("p") and path in self.files:
                start, _, end = where.partition("-")
                found.add((int(start, 16), int(end, 16)))
        return found


_libc = ctypes.CDLL(None) if _MAPS.exists() else None
