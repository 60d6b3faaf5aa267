"""Failures of the operating system while a result is written: one sentence each, and SIGTERM as an exception."""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from reparam.errors import DiskFull, WriteFailed

# EFBIG (file too large): `ulimit -f` and some file systems report a lack of space this way.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def reason(error: OSError) -> str:
    """What the operating system says, without the number and the path."""
    return error.strerror or str(error)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """While the block runs, let SIGTERM end the process by an exception, so that the cleanup runs.

    Does nothing if the program handles SIGTERM itself, or outside the main thread.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


@contextmanager
def explained(target: Path) -> Iterator[None]:
    """Turn failures of the operating system into DiskFull or WriteFailed, with the state of the target."""
    existed = target.exists()
    try:
        yield
    except (DiskFull, WriteFailed):
        raise
    except Exception as error:
        number = _number(error)
        if number is None or not _concerns(error, target):
            raise
        kept = "the previous content is intact" if existed else "no partial result remains"
        if number in _NO_ROOM:
            raise DiskFull(
                f"not enough disk space to write {target} ({error}); {kept}. Free some space and try again"
            ) from error
        raise WriteFailed(f"{target}: cannot be written: {os.strerror(number)}; {kept}") from error


def _concerns(error: Exception, target: Path) -> bool:
    """Whether the error is about the target, its staged files or the folders above, not a file that was read."""
    if not isinstance(error, OSError) or error.filename is None:
        return True
    path = Path(os.fsdecode(error.filename))
    if target.is_relative_to(path):
        return True
    entry = path.relative_to(target.parent).parts[0] if path.is_relative_to(target.parent) else ""
    return entry == target.name or entry.startswith(f".{target.name}.reparam-")


def _number(error: BaseException | None) -> int | None:
    """The operating system's number of an error or of its cause; None for other errors, such as those made here."""
    if error is None:
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    # safetensors reports the number only in its message.
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found is not None else _number(error.__cause__)
