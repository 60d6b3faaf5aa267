"""Open a data file, decompressed, with a limit for files that become far larger than they are."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from reparam.core.text import sized
from reparam.errors import DataError

FREE = 2**30
"""Bytes that every file may become."""
RATIO = 200
"""How many times its size a larger file may become. gzip makes text 3 to 20 times smaller, and at most 1,032 times."""


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file. Files that end in .gz or .zst are decompressed while they are read.

    Raises DataError if the file cannot be read or is damaged, or decompresses to more than `FREE` bytes and to more
    than `RATIO` times its size.
    """
    try:
        if path.suffix.lower() == ".gz":
            with gzip.open(path) as unzipped, io.BufferedReader(_Limited(unzipped, path)) as limited:
                yield limited
        elif path.suffix.lower() == ".zst":
            import pyarrow

            with (
                path.open("rb") as file,  # by Python, so that Ctrl-C ends the wait for the writer of a pipe
                pyarrow.CompressedInputStream(file, "zstd") as stream,
                io.BufferedReader(_Limited(stream, path)) as limited,
            ):
                yield limited
        else:
            with path.open("rb") as file:
                yield file
    except ImportError:
        raise DataError([f"{path}: reading .zst files needs pyarrow: pip install 'reparam[data]'"]) from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        reason = reason or f"not a complete {path.suffix.removeprefix('.')} file"
        raise DataError([f"{path}: cannot be read: {reason}"]) from error


def check_size(path: Path, found: int, what: str = "decompresses to") -> None:
    """Raise DataError if a file has become `found` bytes, which is more than it may."""
    own = path.stat().st_size
    if found > max(FREE, RATIO * own):
        raise DataError(
            [
                f"{path}: {what} more than {sized(max(FREE, RATIO * own))}, {RATIO} times its size of {sized(own)}, so "
                f"it is taken for damaged or made to fill the memory; if it is not, decompress it first"
            ]
        )


class _Limited(io.RawIOBase):
    """A stream that counts what is read from it."""

    def __init__(self, inner: Any, path: Path) -> None:
        self._inner, self._path, self._count = inner, path, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._inner.read(len(buffer))
        self._count += len(content)
        check_size(self._path, self._count)
        buffer[: len(content)] = content
        return len(content)
