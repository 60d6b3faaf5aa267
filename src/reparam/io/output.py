"""Check an output folder before the work whose result goes into it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection
from pathlib import Path

from reparam.core.checks import listed
from reparam.errors import ConfigError, WriteFailed
from reparam.io.failures import reason


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Raise WriteFailed unless files can be written into `folder`, or the folder can be made. Leaves nothing behind."""
    there = Path(os.path.abspath(folder))
    try:
        while not os.path.lexists(there):
            there = there.parent
        if not there.is_dir():
            raise WriteFailed(f"{folder}: cannot be written, because {there} is not a folder; choose another output")
        with tempfile.TemporaryFile(dir=there):
            pass
    except WriteFailed:
        raise
    except OSError as error:
        raise WriteFailed(
            f"{folder}: cannot be written, because no file can be made in {there}: {reason(error)}; choose another "
            f"output, or change the permissions"
        ) from None


def check_output(folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raise if the result of a command cannot become the folder `folder`; call this before the work.

    Raises ConfigError if the folder holds files and `overwrite` is False, and WriteFailed if it cannot be written.
    """
    path = Path(folder)
    held = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    if held and not overwrite:
        raise ConfigError(
            f"{folder} is not empty ({listed(held, shown=3)}); choose another output, or replace it with --overwrite"
        )
    check_writable(folder)
    check_writable(Path(os.path.abspath(folder)).parent)  # the result is moved into place from there


def check_own(folder: str | os.PathLike[str], record: str, *, own: Collection[str] = ()) -> None:
    """Raise unless a run may write into `folder`: ConfigError if the folder holds files that are not those of a run.

    A folder in which an earlier run has left its `record` may hold anything. `own` are the files and folders that a run
    writes before the record. Hidden files are ignored. Raises WriteFailed if the folder cannot be written.
    """
    path = Path(folder)
    held = sorted(e.name for e in path.iterdir()) if path.is_dir() and not (path / record).exists() else []
    foreign = [name for name in held if name not in own and not name.startswith(".")]
    if foreign:
        raise ConfigError(
            f"{folder} holds files ({listed(foreign, shown=3)}) but no {record}, so it is not the folder of an earlier "
            f"run; choose another output folder"
        )
    check_writable(folder)
