"""A pseudo-terminal, and what a command shows on it."""

from __future__ import annotations

import os
import pty
import subprocess
from collections.abc import Sequence


def on_terminal(command: Sequence[str]) -> str:
    """What a command shows on a terminal of 120 columns and 40 lines. It must end without an error."""
    leader, follower = pty.openpty()
    settings = {**os.environ, "COLUMNS": "120", "LINES": "40", "TERM": "xterm"}
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=settings)
    os.close(follower)
    told = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        told += part
    os.close(leader)
    assert process.wait() == 0, told.decode()
    return told.decode()
