"""Check an output folder before the work whose result goes into it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from reparam.errors import WriteFailed
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
