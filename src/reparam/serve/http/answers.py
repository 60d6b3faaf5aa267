"""The answers to one request: they begin together, are sent whole or as events, and end together."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from sse_starlette.sse import AppStatus, EventSourceResponse, SendTimeoutError
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from reparam.serve.engine import Engine
from reparam.serve.http.auth import Gate
from reparam.serve.http.errors import Problem, problem_of
from reparam.serve.http.guard import Caller, Gone
from reparam.serve.http.metrics import Traffic
from reparam.serve.http.settings import Settings
from reparam.serve.http.shapes import Shape, usage_of
from reparam.serve.request import Request, Token
from reparam.serve.stream import Stream

AppStatus.disable_automatic_graceful_drain()  # streams end with their answers when the server stops


class Answers:
    """The answers to one request. `close` must be called, whatever happens."""

    def __init__(self, engine: Engine, settings: Settings, gate: Gate, traffic: Traffic, caller: Caller) -> None:
        self._engine = engine
        self._settings = settings
        self._gate = gate
        self._traffic = traffic
        self._caller = caller
        self._begun = time.monotonic()
        self._streams: list[Stream] = []
        self._stack = contextlib.ExitStack()
        self._copies = 1

    async def begin(self, requests: Sequence[Request], *, copies: int) -> None:
        """Begin all answers; `copies` of them are to one prompt. Raises Problem and the errors of the engine.

        After an error, no answer is left.
        """
        self._copies = copies
        self._stack.enter_context(self._gate.open(self._caller.owner, len(requests)))
        try:
            async with asyncio.timeout(self._settings.seconds):
                for request in requests:
                    stream = await self._engine.open(request)
                    self._stack.callback(stream.cancel)
                    self._streams.append(stream)
        except BaseException as error:
            self.close()
            if isinstance(error, TimeoutError):
                raise _late(self._settings.seconds) from None
            raise

    def close(self) -> None:
        """End all answers that have not ended."""
        self._stack.close()

    async def respond(self, http: HttpRequest, shape: Shape, *, stream: bool, usage: bool) -> Response:
        """The whole answer, or the stream of its events; with `usage`, the last event tells the usage."""
        shape.digest = self._streams[0].digest
        if stream:
            return _Events(self, self._events(shape, usage), self._settings.send_seconds)
        try:
            return await self._unless_gone(http, shape)
        finally:
            self.close()

    async def _unless_gone(self, http: HttpRequest, shape: Shape) -> Response:
        """The whole answer. Raises Gone if the client closes the connection before it is there."""
        whole = asyncio.ensure_future(self._whole(shape))
        gone = asyncio.ensure_future(_closed(http))
        try:
            await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not whole.done():
                raise Gone
            return JSONResponse(whole.result())
        finally:
            for task in (whole, gone):
                task.cancel()
            await asyncio.gather(whole, gone, return_exceptions=True)

    async def _whole(self, shape: Shape) -> dict[str, Any]:
        tokens: list[list[Token]] = [[] for _ in self._streams]
        async for number, token in self._each():
            if token is not None:
                tokens[number].append(token)
        return shape.whole([(own, str(s.end)) for own, s in zip(tokens, self._streams, strict=True)], self._usage())

    async def _events(self, shape: Shape, usage: bool) -> AsyncIterator[dict[str, str]]:
        try:
            begun: set[int] = set()
            async for number, token in self._each():
                if number not in begun:
                    begun.add(number)
                    if (first := shape.begin(number)) is not None:
                        yield _event(shape.event(first, None))
                if token is None:
                    yield _event(shape.event(shape.end(number, str(self._streams[number].end)), None))
                elif token.text or shape.text_of is not None:
                    yield _event(shape.event(shape.part(number, token), None))
            if usage:
                yield _event(shape.event(None, self._usage()))
            yield {"data": "[DONE]"}
        except Exception as error:
            yield _event(problem_of(error).body)
        finally:
            self.close()

    async def _each(self) -> AsyncIterator[tuple[int, Token | None]]:
        """The tokens of all answers as they come, with the number of their answer; None at its end."""
        found: asyncio.Queue[tuple[int, Token | None] | Exception] = asyncio.Queue()

        async def read(number: int, stream: Stream) -> None:
            try:
                async for token in stream:
                    found.put_nowait((number, token))
                found.put_nowait((number, None))
            except Exception as error:
                found.put_nowait(error)

        tasks = [asyncio.create_task(read(number, stream)) for number, stream in enumerate(self._streams)]
        left, first = len(tasks), True
        try:
            while left:
                try:
                    rest = self._begun + self._settings.seconds - time.monotonic()
                    event = await asyncio.wait_for(found.get(), max(rest, 0.001))
                except TimeoutError:
                    raise _late(self._settings.seconds) from None
                if isinstance(event, Exception):
                    raise event
                if first:
                    self._traffic.first_token.observe(time.monotonic() - self._begun)
                    first = False
                left -= event[1] is None
                yield event
        finally:
            for task in tasks:
                task.cancel()
            self._tell()

    def _usage(self) -> dict[str, Any]:
        all_of_them = [stream.usage for stream in self._streams]
        return usage_of(all_of_them[:: self._copies], all_of_them)

    def _tell(self) -> None:
        """Let the log have the numbers of tokens."""
        usage = self._usage()
        self._caller.told += f" {usage['prompt_tokens']}+{usage['completion_tokens']} tokens"


class _Events(EventSourceResponse):
    """A stream of events that ends its answers, also if it never begins or the client leaves."""

    def __init__(self, answers: Answers, events: AsyncIterator[dict[str, str]], seconds: float) -> None:
        super().__init__(events, sep="\n", send_timeout=seconds)
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except (SendTimeoutError, OSError):
            pass  # the connection is closed, since its answer is not complete
        finally:
            self._answers.close()


async def _closed(http: HttpRequest) -> None:
    """Wait until the client closes the connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _late(seconds: float) -> Problem:
    return Problem(503, f"the answer was not complete after {seconds:g} seconds; ask for fewer tokens", code="timeout")


def _event(body: dict[str, Any]) -> dict[str, str]:
    return {"data": json.dumps(body, ensure_ascii=False, separators=(",", ":"))}
