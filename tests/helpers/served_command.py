"""`reparam serve` in this process: what is asked while it serves, and the signal that ends it."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable

from command import reparam


def serve(*arguments: object, ask: Callable[[int], None], end: signal.Signals = signal.SIGTERM) -> int:
    """Run the verb, call `ask` with its port once it is ready, and send this process a signal; the exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    problems: list[BaseException] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=10).read()
                break
            except OSError:
                time.sleep(0.05)
        try:
            if not over.is_set():
                ask(port)
        except BaseException as problem:
            problems.append(problem)
        if not over.is_set():
            os.kill(os.getpid(), end)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        code = reparam("serve", *arguments, "--port", port)
    finally:
        over.set()
        thread.join(60)
    if problems:
        raise problems[0]
    return code
