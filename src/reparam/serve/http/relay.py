"""Requests that engines in other processes answer: which one is asked, and what happens if it dies."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from reparam.errors import ClientGone, ReparamError
from reparam.io import files
from reparam.serve.http.blends import is_sum, terms
from reparam.serve.http.errors import Problem
from reparam.serve.http.guard import Caller, caller_of
from reparam.serve.http.metrics import Traffic
from reparam.serve.http.settings import Settings
from reparam.serve.inside import check_inside, check_no_pickle
from reparam.serve.proof import digest
from reparam.serve.store import adapters_in

TRIES = 4
"""How often a request is sent, if each time the engine dies before anything of its answer is sent."""
PAUSE = 0.2
"""Seconds before the second try; twice as many before each further one."""
PASSED = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")
Call = Callable[[dict[str, Any], bytes, Caller, Mapping[str, str]], AsyncIterator[Message]]
_log = logging.getLogger("reparam.serve.http")


class Relay:
    """An ASGI application that lets `call` answer: from the request's scope and body, who asks, and the digests of the
    adapters by name, it makes the messages of the answer. If it raises any error, the engine counts as dead.
    """

    def __init__(self, call: Call, settings: Settings, traffic: Traffic) -> None:
        self._call = call
        self._settings = settings
        self._traffic = traffic
        self._folders = {} if settings.root is None else adapters_in(settings.root)
        self._digests: dict[str, str] = {}
        self._reading = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. Raises Problem, of which the guard makes an answer, as long as nothing was sent."""
        if scope["type"] == "lifespan":
            return await _lifespan(receive, send)
        if scope["path"] == "/metrics":
            numbers = generate_latest(self._traffic.registry)
            return await Response(numbers, media_type=CONTENT_TYPE_LATEST)(scope, receive, send)
        body = b"" if scope["method"] in ("GET", "HEAD") else (await receive())["body"]
        answering = asyncio.ensure_future(self._answer(scope, body, send))
        leaving = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                raise ClientGone
            return answering.result()
        finally:
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _answer(self, scope: Scope, body: bytes, send: Send) -> None:
        caller, wanted = caller_of(scope), await self._wanted(body)
        passed = {name: scope[name] for name in PASSED if name in scope}
        sending = _Sending(send)
        for number in range(1, TRIES + 1):
            try:
                async with asyncio.timeout(self._settings.seconds):
                    async for message in self._call(passed, body, caller, wanted):
                        await sending(message)
                return None
            except Exception as error:
                _log.warning("%s its engine failed (%s)", caller.id, type(error).__name__)
                problem = _problem(error)
                if sending.over:
                    return None
                if sending.begun:
                    return await sending.end(problem)
                if number == TRIES or problem.status == 429 or isinstance(error, TimeoutError):
                    raise problem from None
            await asyncio.sleep(PAUSE * 2 ** (number - 1))
        return None

    async def _wanted(self, body: bytes) -> dict[str, str]:
        """The digests of the adapters that a request names; those that cannot be read are left out."""
        try:
            model = json.loads(body)["model"]
            names = terms(model) if is_sum(model) else [model]
            return {name: await self._digest(name) for name in names if name in self._folders}
        except (ValueError, TypeError, KeyError, RecursionError, ReparamError, OSError, Problem):
            return {}  # the engine tells what is wrong

    async def _digest(self, name: str) -> str:
        """That of the adapter's files when it was first asked for."""
        async with self._reading:
            if name not in self._digests:
                self._digests[name] = await asyncio.to_thread(self._read, self._folders[name])
        return self._digests[name]

    def _read(self, folder: Path) -> str:
        root = self._settings.root
        assert root is not None
        check_inside(folder, root)
        check_no_pickle(folder)
        return digest(files.read(folder))


class _Sending:
    """Sends an answer. Its head waits for its first part, so that until then another engine can be asked."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._head: Message | None = None
        self.begun = False
        self.over = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._head = message
            return
        if not self.begun and self._head is not None:
            self.begun = True
            await self._send(self._head)
        self.over = not message.get("more_body", False)
        await self._send(message)

    async def end(self, problem: Problem) -> None:
        """End a stream with an error event, which no end of the answer follows."""
        event = json.dumps(problem.body, separators=(",", ":"))
        await self._send({"type": "http.response.body", "body": f"data: {event}\n\n".encode()})


def _problem(error: Exception) -> Problem:
    if type(error).__name__ == "BackPressureError":
        return Problem(429, "too many requests wait; send it again later", code="too_many_requests", retry=1)
    if isinstance(error, TimeoutError):
        return Problem(503, "the answer was not complete in time; ask for fewer tokens", code="timeout")
    return Problem(503, "the engine that computed the answer has ended; send it again", code="answer_failed", retry=1)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _lifespan(receive: Receive, send: Send) -> None:
    for kind in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{kind}.complete"})
