"""Render chat templates in a process of their own, with limits of time and memory.

A template is part of a downloaded folder, and may loop without end or fill the memory. `data/sandbox.py` is the program
of the process, which is started at the first chat and shared by all templates. It is ended, and started again for the
next request, when a template takes too long.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reparam.errors import DataError

SECONDS = 5.0
"""The longest time for one chat; a template usually takes less than a thousandth of a second."""


class _Process:
    """The process that renders. One request is answered at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: subprocess.Popen[str] | None = None
        self._owner = 0  # a fork of this process starts its own
        atexit.register(self.end)

    def ask(self, request: Mapping[str, Any]) -> Any:
        """The response, or None if it takes longer than `SECONDS`."""
        with self._lock:
            running = self._running if self._owner == os.getpid() else None
            if running is None or running.poll() is not None:
                running = self._start()
            assert running.stdin is not None
            assert running.stdout is not None
            answered = False
            try:
                running.stdin.write(json.dumps(request, default=str) + "\n")
                running.stdin.flush()
                if not select.select([running.stdout], [], [], SECONDS)[0]:
                    return None
                line = running.stdout.readline()
                answered = bool(line)
            except BrokenPipeError:
                line = ""
            finally:  # also after an interrupt: the response would be taken for that to the next request
                if not answered:
                    self.end()
            return json.loads(line) if line else {"error": "ended the process that renders it", "fatal": True}

    def _start(self) -> subprocess.Popen[str]:
        program = Path(__file__).with_name("sandbox.py")
        running = subprocess.Popen(
            [sys.executable, "-P", str(program)],  # -P: the files beside the program are not modules
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert running.stdout is not None
        self._running, self._owner = running, os.getpid()
        running.stdout.readline()  # so that starting does not count as rendering
        return running

    def end(self) -> None:
        """End the process, if this process started it."""
        running, self._running = self._running, None
        if running is not None and self._owner == os.getpid():
            running.kill()
            running.communicate()


_process = _Process()


def render_digests(template: str, variables: Mapping[str, Any], chats: Sequence[Any]) -> Sequence[str | None]:
    """The SHA-256 of the texts of several chats, which are lists of messages; None for each that has no text."""
    found = _process.ask({"template": template, "variables": dict(variables), "chats": chats})
    return found if isinstance(found, list) and len(found) == len(chats) else [None] * len(chats)


def render(template: str, variables: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """The rendered text, and the character ranges inside `{% generation %}`.

    Raises ValueError if the template refuses the values, and DataError if it cannot be read, or takes too much time or
    memory.
    """
    import jinja2  # noqa: F401  (its absence is reported as that of any other package)

    found = _process.ask({"template": template, "variables": dict(variables)})
    if found is None:
        found = {"error": f"takes longer than {SECONDS:.0f} seconds for one chat", "fatal": True}
    if "text" in found:
        return found["text"], [(start, end) for start, end in found["spans"]]
    if found["fatal"]:
        raise DataError(
            [
                f"the chat template {found['error']}; put a sound chat_template.jinja into the tokenizer's folder, "
                "or do without chats: train on prompt and completion, and generate with --raw"
            ]
        )
    raise ValueError(f"the chat template {found['error']}")
