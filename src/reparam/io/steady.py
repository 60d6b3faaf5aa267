"""Read files that others wrote and may replace meanwhile: regular files only, and all of them of one version.

`staged_folder` replaces a folder as a whole, with two renames. A reader that opens two files by their paths can thus
get one of the old folder and one of the new, or find the folder absent for an instant. `steady` calls the reader again
in that case. It holds the folder open meanwhile, so that no other folder gets the same number from the file system.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

from reparam.errors import FormatError
from reparam.io.failures import reason
from reparam.io.staged import between_renames

T = TypeVar("T")
TRIES = 500
PAUSE = 0.002  # seconds between two tries


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """Open a regular file to read.

    Raises FormatError if it is missing, not a regular file (a pipe would block), or cannot be opened or read.
    """
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise FormatError(f"{file}: not a regular file; remove it, or name another folder")
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK)  # if a pipe replaces the file meanwhile, do not wait for it
        with os.fdopen(handle, "rb") as found:
            yield found
    except FileNotFoundError:
        raise FormatError(f"{file}: no such file; the adapter is incomplete") from None
    except OSError as error:
        raise FormatError(f"{file}: cannot be read: {reason(error)}") from error


def steady(folder: Path, read: Callable[[], T]) -> T:
    """Call `read`, which reads files of `folder`, until the folder was not replaced while it ran; return its result.

    Raises the error of `read` if the folder stayed the same, and FormatError if it cannot be read or is replaced again
    and again.
    """
    for _ in range(TRIES):
        try:
            with _held(folder) as before:
                try:
                    found = read()
                except (FormatError, OSError):
                    if _unchanged(folder, before):
                        raise
                else:
                    if _unchanged(folder, before):
                        return found
        except OSError as error:
            raise FormatError(f"{folder}: cannot be read: {reason(error)}") from error
        time.sleep(PAUSE)
    raise FormatError(f"{folder}: another process replaced it {TRIES} times while it was read; try again later")


@contextmanager
def _held(folder: Path) -> Iterator[os.stat_result | None]:
    """Hold the folder open; its identity, or None if it is absent."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        yield None
        return
    try:
        yield os.fstat(handle)
    finally:
        os.close(handle)


def _unchanged(folder: Path, before: os.stat_result | None) -> bool:
    if before is None:
        return not (folder.is_dir() or between_renames(folder) or folder.is_dir())  # it may arrive in between
    try:
        return os.path.samestat(before, os.stat(folder))
    except FileNotFoundError:
        return False
