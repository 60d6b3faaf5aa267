"""An answer whose tokens come one by one, for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Literal

from reparam.errors import ReparamError
from reparam.serve.request import Token, Usage
from reparam.serve.tickets import End, Ticket


class Stream:
    """The tokens of an answer: `async for token in stream`.

    The iteration ends with the answer, and raises AnswerFailed or Unavailable if the engine fails or closes. Made in
    the thread of the event loop that reads it. `Engine.open` makes streams.
    """

    def __init__(self, ticket: Ticket, cancel: Callable[[], None]) -> None:
        self._ticket = ticket
        self._cancel = cancel
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Token | End] = asyncio.Queue()
        self._error: ReparamError | None = None
        self.end: Literal["stop", "length", "cancelled"] | None = None
        """Why the answer ended, once all its tokens have been read."""
        ticket.on_token = ticket.on_end = self._send

    @property
    def digest(self) -> str | None:
        """The digest of the adapter that answers; None for the base."""
        return self._ticket.digest

    @property
    def usage(self) -> Usage:
        """The tokens so far; those of the whole answer at its end."""
        return self._ticket.usage

    def cancel(self) -> None:
        """End the answer, unless it has ended."""
        if self._ticket.ended is None:
            self._cancel()

    def __aiter__(self) -> AsyncIterator[Token]:
        return self

    async def __anext__(self) -> Token:
        if self._error is not None:
            raise self._error
        if self.end is not None:
            raise StopAsyncIteration
        event = await self._events.get()
        if isinstance(event, Token):
            return event
        if isinstance(event, ReparamError):
            self._error = event
            raise event
        self.end = event
        raise StopAsyncIteration

    def _send(self, event: Token | End) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
