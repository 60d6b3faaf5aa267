"""What every request passes first: its id, its key, where it comes from, and the size of its body.

Nothing of a request's content is logged: a line has its id, method, address, status and time, and the model and the
numbers of tokens.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import re
import secrets
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reparam.serve.http.auth import Gate, Keys
from reparam.serve.http.errors import Problem, problem_of
from reparam.serve.http.metrics import Traffic
from reparam.serve.http.settings import Settings

OPEN = ("/", "/health", "/ready")
"""Addresses that need no key: they tell nothing about requests or adapters."""
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
}
ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_log = logging.getLogger("reparam.serve.http")


@dataclasses.dataclass
class Caller:
    """Who sends a request. In the scope of the request as "reparam"."""

    id: str
    """The id of the request."""
    owner: str = ""
    """An identifier of the key; "" without keys."""
    told: str = ""
    """What the line in the log says besides: the model and the numbers of tokens."""


class Guard:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, settings: Settings, traffic: Traffic, most: int) -> None:
        """`most` is the number of answers that can be open at once."""
        self.app = app
        self.settings = settings
        self.traffic = traffic
        self.keys = Keys(settings.keys)
        self.gate = Gate(min(settings.key_requests, most))
        self.stopping = False
        """Whether new requests are refused, because the server stops."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, and give it to the application."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        headers, begun = Headers(scope=scope), time.monotonic()
        asked = headers.get("x-request-id", "")
        caller = scope["reparam"] = Caller(asked if ID.fullmatch(asked) else f"req-{secrets.token_hex(12)}")
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = MutableHeaders(scope=message)
                own["x-request-id"] = caller.id
                own.setdefault("cache-control", "no-store")
                for name, value in HEADERS.items():
                    own.setdefault(name, value)
            await send(message)

        try:
            self._check(scope, headers, caller)
            await self.app(scope, await self._with_body(scope, headers, receive), answer)
        except Gone:
            pass
        except Exception as error:
            if not status:  # otherwise the application has answered, and logged what it could not handle
                await problem_of(error).response()(scope, receive, answer)
        finally:
            self._log(scope, caller, status, time.monotonic() - begun)
        return None

    def _check(self, scope: Scope, headers: Headers, caller: Caller) -> None:
        """Raise Problem for a request that is not answered, whatever its body."""
        host = headers.get("host", "")
        if self.settings.hosts is not None and _name(host) not in self.settings.hosts:
            raise Problem(403, "the header Host has another name than that of this server", code="wrong_host")
        if scope["method"] not in ("GET", "HEAD"):
            self._check_origin(headers, host)
        if scope["path"] not in OPEN:
            caller.owner = self.keys.owner(headers.get("authorization"))
        if self.stopping and scope["path"].startswith("/v1/"):
            raise Problem(503, "the server stops; send the request to another one", code="stopping", retry=2)

    def _check_origin(self, headers: Headers, host: str) -> None:
        """Raise Problem for a request that a browser sends for the page of another server."""
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        foreign = site not in ("same-origin", "none") if site else origin and urlsplit(origin).netloc != host
        if foreign:
            raise Problem(403, "pages of other servers cannot use this one", code="wrong_origin")

    async def _with_body(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        """The same messages, after the whole body has come. Raises Problem 413 or 408."""
        if scope["method"] in ("GET", "HEAD"):
            return receive
        most = self.settings.body_bytes
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > most:
            raise _too_long(most)
        body = bytearray()
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise _too_long(most)
                    more = message.get("more_body", False)
        except TimeoutError:
            raise Problem(
                408, f"the request was not complete after {self.settings.body_seconds:g} seconds", code="timeout"
            ) from None
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        return again

    def _log(self, scope: Scope, caller: Caller, status: int, seconds: float) -> None:
        place = getattr(scope.get("route"), "path", "") or (scope["path"] if scope["path"] in OPEN else "unknown")
        self.traffic.answered(place, status or 499, seconds)
        _log.info(
            "%s %s %s %d %.3f s%s",
            caller.id,
            scope["method"],
            place,
            status or 499,
            seconds,
            caller.told and f" {caller.told}",
        )


class Gone(Exception):  # noqa: N818
    """The client has closed the connection."""


def _too_long(most: int) -> Problem:
    return Problem(413, f"the body has more than the {most:,} bytes that this server takes", code="body_too_large")


def _name(host: str) -> str:
    """The name in a Host header, without its port.

    >>> _name("localhost:8000"), _name("[::1]:8000")
    ('localhost', '::1')
    """
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def caller_of(scope: Mapping[str, Any]) -> Caller:
    """Who sends the request of this scope."""
    found: Caller = scope["reparam"]
    return found
