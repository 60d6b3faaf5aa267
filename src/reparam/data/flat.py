"""Flat arrays that grow: in memory while they are small, in files when they are large."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

IN_MEMORY = 1 << 25  # bytes of an array that is kept in memory
BUFFER = 1 << 20  # bytes that are written to a file at a time
DTYPES = {"int32": torch.int32, "int64": torch.int64, "bool": torch.bool, "uint8": torch.uint8}

# The values of an array, by its name, and what each is.
TYPES = {
    "ids": "int32",  # token ids
    "loss": "bool",  # whether a token carries loss
    "lengths": "int32",  # tokens of each example
    "loss_tokens": "int32",  # tokens with loss of each example
    "text_bytes": "int32",  # UTF-8 bytes that the loss tokens of each example represent
    "row": "int64",  # number of the row that each example comes from
    "tokens": "int32",  # tokens of each row, before anything is cut off
    "file": "int32",  # number of the place's name, for each row
    "line": "int64",  # line or row of the place, for each row
    "task": "int32",  # number of the row's task in the order in which tasks occur; -1 for none
    "flags": "uint8",  # what happened to each row: data.corpus
}


class Growing:
    """One flat array. Values are appended; `values` gives all of them as a tensor, which may be a mapped file."""

    def __init__(self, dtype: str, file: Path | None = None) -> None:
        """`file` is where the values are written; without it, memory is used and then a nameless temporary file."""
        self._dtype = np.dtype(dtype)
        self._memory = bytearray()
        self._file: IO[bytes] | None = file.open("w+b") if file is not None else None
        self._size = 0

    def append(self, values: Any) -> None:
        """Append a list or an array of values."""
        data = np.ascontiguousarray(values, dtype=self._dtype)
        self._size += data.size
        self._memory += data.view(np.uint8).data
        if len(self._memory) > (IN_MEMORY if self._file is None else BUFFER):
            self._write()

    def __len__(self) -> int:
        return self._size

    def values(self) -> Tensor:
        """All values. Nothing can be appended after this."""
        if self._file is None:
            return (
                torch.frombuffer(self._memory, dtype=DTYPES[self._dtype.name]) if self._size else _nothing(self._dtype)
            )
        self._write()
        self._file.flush()
        return mapped(self._file, self._dtype.name, self._size)

    def _write(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  (it disappears with this object)
        self._file.write(self._memory)
        self._memory = bytearray()


def mapped(file: IO[bytes] | Path, dtype: str, size: int) -> Tensor:
    """The content of a file of `size` values, mapped into memory: pages are read when they are used."""
    if not size:
        return _nothing(np.dtype(dtype))
    return torch.from_numpy(np.memmap(file, dtype=dtype, mode="c", shape=(size,)))  # "c": torch needs a writable array


def _nothing(dtype: np.dtype[Any]) -> Tensor:
    return torch.from_numpy(np.zeros(0, dtype=dtype))
