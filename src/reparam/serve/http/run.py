"""Serve the application with uvicorn until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Generator
from types import FrameType

import uvicorn

from reparam.serve.engine import Engine
from reparam.serve.http.app import create_app
from reparam.serve.http.settings import Settings

CONNECTIONS = 2048
"""Open connections; further ones are answered with 503 at once."""
AFTER = 5.0
"""Seconds that clients have to read the ends of their answers, after the time for open requests is over."""
_log = logging.getLogger("reparam.serve.http")


def run(engine: Engine, settings: Settings, listener: socket.socket) -> int:
    """Serve an engine on a bound socket until SIGTERM or SIGINT. Returns the exit code: 0, or 130 after SIGINT.

    At the first signal, the server takes no further requests, and ends when all open ones have been answered, or
    `Settings.drain_seconds` are over; answers that are not complete then end with an error. A second SIGINT ends them
    at once. The engine stays open unless answers had to be ended.
    """
    server = Server(engine, settings)
    server.run(sockets=[listener])
    return 130 if server.signal == signal.SIGINT else 0


def bound(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address; port 0 takes a free one.

    Raises ValueError if there is no such host, and OSError if the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise ValueError(f"--host {host}: this machine has no such address; give one of its own") from None
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
        made.listen(128)
    except OSError as error:
        made.close()
        raise OSError(
            f"the server cannot listen on {host}, port {port}: {error.strerror}; choose another port with --port"
        ) from None
    return made


class Server(uvicorn.Server):
    """uvicorn, which finishes answers before it ends."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.guard = create_app(engine, settings)
        super().__init__(
            uvicorn.Config(
                self.guard,
                log_config=None,
                log_level="critical",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                http="h11",
                ws="none",
                lifespan="on",
                limit_concurrency=CONNECTIONS,
                timeout_graceful_shutdown=int(settings.drain_seconds + AFTER),
            )
        )
        self.signal: int | None = None
        """The first signal that came."""
        self._engine = engine
        self._settings = settings

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Stop at SIGTERM and SIGINT. Unlike in uvicorn, the process does not get the signal again afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.should_exit and number == signal.SIGINT:
            self.force_exit = True
        self.signal = self.signal or number
        self.should_exit = self.guard.stopping = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish the open requests, then end."""
        self.guard.stopping = True
        _log.info("the server stops: it takes no further requests, and %d are open", len(self.server_state.tasks))
        ending = asyncio.create_task(self._end_answers())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_answers(self) -> None:
        """Close the engine, which ends all answers with an error, when their time is over."""
        until = time.monotonic() + self._settings.drain_seconds
        while self.server_state.tasks and time.monotonic() < until and not self.force_exit:
            await asyncio.sleep(0.05)
        if self.server_state.tasks:
            _log.info("the server ends the requests that are still open: %d", len(self.server_state.tasks))
            await asyncio.to_thread(self._engine.close)
