"""Open a data file, decompressed."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from reparam.errors import DataError


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file. Files that end in .gz or .zst are decompressed while they are read.

    Raises DataError if the file cannot be read or is damaged.
    """
    try:
        if path.suffix.lower() == ".gz":
            with gzip.open(path) as file:
                yield file  # type: ignore[misc]
        elif path.suffix.lower() == ".zst":
            import pyarrow

            with pyarrow.input_stream(str(path), compression="zstd") as stream:
                yield stream
        else:
            with path.open("rb") as file:
                yield file
    except ImportError:
        raise DataError([f"{path}: reading .zst files needs pyarrow: pip install 'reparam[data]'"]) from None
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError([f"{path}: cannot be read: {reason}"]) from error
