"""The console of the command line, and where its waits are shown."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from rich.console import Console

from reparam.core.progress import listening
from reparam.train import processes

console = Console()
messages = Console(stderr=True)  # for what is no result


@contextmanager
def waits(verb: str, settings: dict[str, Any]) -> Iterator[None]:
    """Show the waits inside the block, unless the verb prints JSON, or another process prints.

    They are bars on a terminal. If standard output is none, they go to standard error: as bars if that is a terminal,
    otherwise as lines. If the verb prints JSON, what libraries print goes to standard error, too.
    """
    if settings.get("json"):
        console.file, out = sys.stdout, console._file
        try:
            with redirect_stdout(sys.stderr):
                yield
        finally:
            console._file = out
        return
    if console.quiet or processes.rank() > 0:
        yield
        return
    from reparam.evaluation.waits import Waits

    shown = Waits(console if console.is_terminal else Console(stderr=True))
    shown.opening(f"starting {verb}")
    try:
        with listening(shown):
            yield
    finally:
        shown.close()
