"""Flat arrays that grow: in memory while they are small, in files when they are large."""

from __future__ import annotations

import tempfile
from array import array
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

IN_MEMORY = 1 << 25  # bytes of an array that is kept in memory
BUFFER = 1 << 20  # bytes that are written to a file at a time
CODES = {"int32": "i", "int64": "q", "bool": "b", "uint8": "B"}  # of the module array
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
        self._memory = array(CODES[dtype])
        self._file: IO[bytes] | None = file.open("w+b") if file is not None else None
        self._written = 0

    def extend(self, values: np.ndarray) -> None:
        """Append an array of values."""
        self._memory.frombytes(np.ascontiguousarray(values, dtype=self._dtype).view(np.uint8).data)
        self._settle()

    def __len__(self) -> int:
        return self._written + len(self._memory)

    def values(self) -> Tensor:
        """All values. Nothing can be appended after this."""
        if self._file is None:
            if not len(self):
                return _nothing(self._dtype)
            return torch.frombuffer(self._memory, dtype=DTYPES[self._dtype.name])
        self._write()
        self._file.flush()
        return mapped(self._file, self._dtype.name, len(self))

    def _settle(self) -> None:
        if len(self._memory) * self._memory.itemsize > (IN_MEMORY if self._file is None else BUFFER):
            self._write()

    def _write(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  (it disappears with this object)
        self._memory.tofile(self._file)
        self._written += len(self._memory)
        self._memory = array(self._memory.typecode)


def mapped(file: IO[bytes] | Path, dtype: str, size: int) -> Tensor:
    """The content of a file of `size` values, mapped into memory: pages are read when they are used."""
    if not size:
        return _nothing(np.dtype(dtype))
    return torch.from_numpy(np.memmap(file, dtype=dtype, mode="c", shape=(size,)))  # "c": torch needs a writable array


def _nothing(dtype: np.dtype[Any]) -> Tensor:
    return torch.from_numpy(np.zeros(0, dtype=dtype))
