"""Parquet and Arrow files, read in batches by pyarrow. Errors name the file and the row, counted from 1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam.data.files.opened import check_size
from reparam.errors import DataError

if TYPE_CHECKING:
    import pyarrow

BATCH = 1024  # rows in memory at a time
FREE_ROWS = 2**20  # rows that every file may have
ROWS_IN_BYTE = 100  # how many rows a larger file may have for each of its bytes; a column of nulls takes none


def read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """The rows of a Parquet file."""
    _check_installed(path)
    import pyarrow.parquet

    yield from _rows(path, lambda: pyarrow.parquet.ParquetFile(path).iter_batches(BATCH))


def read_ipc(path: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """The rows of an Arrow file (Feather is the same), or of an Arrow stream as `datasets` writes it."""
    _check_installed(path)
    import pyarrow

    def batches() -> Iterator[pyarrow.RecordBatch]:
        with pyarrow.memory_map(str(path)) as source:
            try:
                file = pyarrow.ipc.open_file(source)
            except pyarrow.ArrowInvalid:
                yield from pyarrow.ipc.open_stream(source)
            else:
                for index in range(file.num_record_batches):
                    yield file.get_batch(index)

    yield from _rows(path, batches)


def _rows(path: Path, batches: Any) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    import pyarrow

    if not path.is_file():
        raise DataError([f"{path}: not a regular file"])
    number = size = 0
    most = max(FREE_ROWS, ROWS_IN_BYTE * path.stat().st_size)
    try:
        for batch in batches():
            size += batch.nbytes
            check_size(path, size, "holds")
            if number + batch.num_rows > most:
                raise DataError([f"{path}: claims more than {most:,} rows, too many for a file of its size"])
            for start in range(0, batch.num_rows, BATCH):
                for value in batch.slice(start, BATCH).to_pylist():
                    number += 1
                    yield f"{path}:row {number}", value
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        reason = " ".join(str(error).split())
        raise DataError([f"{path}: cannot be read after row {number}: {reason}"]) from error


def _check_installed(path: Path) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise DataError([f"{path}: reading this file needs pyarrow: pip install 'reparam[data]'"]) from None
