"""Parquet and Arrow files, read in batches by pyarrow. Errors name the file and the row, counted from 1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam.errors import DataError

if TYPE_CHECKING:
    import pyarrow

BATCH = 1024  # rows in memory at a time


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

    number = 0
    try:
        for batch in batches():
            for value in batch.to_pylist():
                number += 1
                yield f"{path}:row {number}", value
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError([f"{path}: cannot be read after row {number}: {reason}"]) from error


def _check_installed(path: Path) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise DataError([f"{path}: reading this file needs pyarrow: pip install 'reparam[data]'"]) from None
