"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from reparam.errors import AnswerFailed, Busy, FormatError, ReparamError, Unavailable, UnknownAdapter

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    409: "conflict_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
"""Of other codes, the type is invalid_request_error."""
LONGEST = 1000
"""Characters of a message that quotes a request."""
_log = logging.getLogger(__name__)


class Told(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Body(BaseModel):
    """The body of an error."""

    error: Told


class Problem(Exception):  # noqa: N818  (it has a status of any kind)
    """Why a request is not answered. `code` is a word for programs; `param` is the field that is to blame."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry = retry
        """Seconds after which the client may try again."""

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the answer."""
        found = {} if self.retry is None else {"retry-after": str(self.retry)}
        return {**found, "www-authenticate": "Bearer"} if self.status == 401 else found

    @property
    def body(self) -> dict[str, Any]:
        """The body of the answer, and the error event in a stream."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body, self.status, self.headers)


def problem_of(error: Exception) -> Problem:
    """What an error of the engine means for the client.

    Errors that are no errors of reparam are logged, and tell the client nothing.
    """
    if isinstance(error, Problem):
        return error
    text = str(error)[:LONGEST]
    if isinstance(error, UnknownAdapter):
        return Problem(404, text, code="model_not_found", param="model")
    if isinstance(error, Busy):
        return Problem(429, text, code="too_many_requests", retry=1)
    if isinstance(error, Unavailable):
        return Problem(503, text, code="unavailable", retry=2)
    if isinstance(error, AnswerFailed):
        return Problem(503, text, code="answer_failed", retry=1)
    if isinstance(error, FormatError):
        return Problem(400, text, code="adapter_refused", param="model")
    if isinstance(error, ReparamError):
        return Problem(400, text)
    _log.error("a request met a fault of the server", exc_info=error)
    return Problem(500, "the server failed at this request; its log tells why", code="internal_error")


def sentence(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """What is wrong in a request, and the field that is to blame. Values of the request are not quoted.

    >>> sentence([{"type": "extra_forbidden", "loc": ("body", "min_p")}])
    ('min_p is not honored by this server; leave it out', 'min_p')
    """
    found = []
    for error in errors[:3]:
        path = _path(error["loc"])
        if error["type"] == "extra_forbidden":
            found.append(f"{path} is not honored by this server; leave it out")
        elif error["type"] == "missing":
            found.append(f"{path} is missing" if path else "the body is missing; send JSON")
        elif error["type"] == "json_invalid":
            found.append(f"the body is not JSON: {error.get('ctx', {}).get('error', 'it cannot be read')}")
        elif not path and error["type"] == "model_attributes_type":
            found.append("the body is not a JSON object, or its content-type is not application/json")
        else:
            said = str(error["msg"]).replace(" after validation", "")
            found.append(f"{path}: {said[:1].lower()}{said[1:]}" if path else said)
    more = f" (and {len(errors) - 3} more)" if len(errors) > 3 else ""
    first = "" if not errors or errors[0]["type"] == "json_invalid" else _path(errors[0]["loc"])
    return ("; ".join(found) + more)[:LONGEST], first or None


def install(app: FastAPI) -> None:
    """Let all errors of an application have this shape."""

    @app.exception_handler(Problem)
    @app.exception_handler(ReparamError)
    @app.exception_handler(Exception)
    async def _problem(request: Request, error: Exception) -> JSONResponse:
        return problem_of(error).response()

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        message, param = sentence(error.errors())
        return Problem(400, message, param=param, code="invalid_request").response()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        said = {404: "there is nothing at this address", 405: "this address does not take this method"}
        found = Problem(error.status_code, said.get(error.status_code, str(error.detail)))
        return JSONResponse(found.body, found.status, {**(error.headers or {}), **found.headers})


def _path(place: Sequence[Any]) -> str:
    """The place in a request, such as messages[0].content."""
    found = ""
    for part in place[1:] if place and place[0] == "body" else place:
        found += f"[{part}]" if isinstance(part, int) else f".{part}" if found else str(part)
    return found
