"""Bad requests get an error in OpenAI's shape that names the field; none gets a 500, and none stops the server.

REPARAM_FUZZ_SECONDS=3600 sends new ones for that long.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bad_requests
import http_server
import pytest
from bad_requests import Bad
from http_server import Served
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

FULL = os.environ.get("REPARAM_TESTS") == "full"
SECONDS = float(os.environ.get("REPARAM_FUZZ_SECONDS", 60 if FULL else 0))
KINDS = {401: "authentication_error", 403: "permission_error", 409: "conflict_error", 429: "rate_limit_error"}


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with http_server.serving(folder, loading=True) as running:
        yield running
        assert running.engine.metrics().restarts == 0
        assert running.client().completions.create(model="a", prompt="x", max_tokens=2).usage.completion_tokens == 2


class Line:
    """A connection that is kept."""

    def __init__(self, served: Served) -> None:
        self.made = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)

    def ask(
        self, path: str, body: bytes | None, headers: dict[str, str] | None = None, method: str | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        given = {**({} if body is None else {"content-type": "application/json"}), **(headers or {})}
        method = method or ("GET" if body is None else "POST")
        try:
            self.made.request(method, path, body, given)
            answer = self.made.getresponse()
        except (http.client.HTTPException, OSError):  # the server closes connections that nobody uses
            self.made.close()
            self.made.request(method, path, body, given)
            answer = self.made.getresponse()
        text = answer.read()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, json.loads(text) if "json" in found.get("content-type", "") else text, found


@pytest.fixture(scope="module")
def line(served: Served) -> Line:
    return Line(served)


def check(line: Line, bad: Bad) -> None:
    status, body, _ = line.ask(bad.path, bad.body)
    assert status == bad.status, (bad, body)
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == KINDS.get(status, "invalid_request_error")
    assert bad.word in error["message"], (bad, error)
    assert 5 < len(error["message"]) <= 1000


def test_every_kind_of_bad_request_is_refused_by_the_name_of_its_field(line: Line) -> None:
    known = list(bad_requests.each())
    assert len(known) > 200
    for bad in known:
        check(line, bad)


def test_mixed_and_damaged_requests_never_get_a_500(line: Line) -> None:
    for bad in bad_requests.many(10_000 if FULL else 150, seed=1):
        status, body, _ = line.ask(bad.path, bad.body)
        assert status in (200, 400, 404), (bad, status, body)
        assert status == 200 or set(body["error"]) == {"message", "type", "param", "code"}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = sorted({*bad_requests.WRONG, *bad_requests.ONLY[bad_requests.CHAT], *bad_requests.ONLY[bad_requests.TEXT]})


ANY = settings(suppress_health_check=list(HealthCheck), deadline=None, database=None)
PATHS = st.sampled_from([*bad_requests.GOOD, "/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
BODIES = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), VALUES, max_size=4)


def check_any(line: Line, path: str, fields: dict[str, Any]) -> int:
    body = {**bad_requests.GOOD.get(path, {"lora_name": "a", "lora_path": "nowhere"}), **fields}
    status, answer, _ = line.ask(path, json.dumps(body).encode())
    assert status in (200, 400, 403, 404, 409), (status, answer)
    return status


@settings(ANY, max_examples=20_000 if FULL else 60)
@given(path=PATHS, fields=BODIES)
def test_whatever_stands_in_the_fields_there_is_an_answer(line: Line, path: str, fields: dict[str, Any]) -> None:
    check_any(line, path, fields)


@pytest.mark.skipif(not SECONDS, reason="set REPARAM_FUZZ_SECONDS")
@pytest.mark.timeout(2 * SECONDS + 600)
def test_requests_of_all_kinds_for_a_given_time(served: Served, line: Line) -> None:
    """Rounds with seeds of their own; after each one, an answer is what it was at the beginning."""
    asked: dict[str, Any] = {"model": "b", "prompt": "def area(", "max_tokens": 8, "temperature": 0}
    client = served.client().with_options(timeout=600)
    right = client.completions.create(**asked).choices[0].text
    end, number, count = time.monotonic() + SECONDS, 0, dict.fromkeys((200, 400, 403, 404, 409), 0)

    while time.monotonic() < end:
        number += 1

        @seed(number)
        @settings(ANY, max_examples=200)
        @given(path=PATHS, fields=BODIES)
        def one_round(path: str, fields: dict[str, Any]) -> None:
            count[check_any(line, path, fields)] += 1

        one_round()
        for bad in bad_requests.many(100, seed=number):
            status, body, _ = line.ask(bad.path, bad.body)
            assert status in (200, 400, 404), (bad, status, body)
            count[status] += 1
        assert client.completions.create(**asked).choices[0].text == right
        assert served.engine.metrics().restarts == 0
        print(f"round {number}: {sum(count.values()):,} requests, by status {count}", flush=True)


def test_loading_by_name_and_path(line: Line, folder: Path) -> None:
    def load(name: Any, path: Any, **more: Any) -> tuple[int, str]:
        body = json.dumps({"lora_name": name, "lora_path": path, **more}).encode()
        status, answer, _ = line.ask("/v1/load_lora_adapter", body)
        return status, answer.decode() if isinstance(answer, bytes) else answer["error"]["message"]

    (folder / "adapters" / "empty").mkdir(exist_ok=True)
    assert load("new", "a")[0] == 200
    assert load("new", "b")[0] == 409
    assert load("new", "b", load_inplace=True)[0] == 200
    for path in ("..", "../tiny", "/etc", ".", "a/../..", str(folder / "tiny")):
        assert load("x", path)[0] == 403, path
    assert load("x", str(folder / "adapters" / "a"))[0] == 200  # the whole path of a folder below
    for path in ("nowhere", "a\0", "a" * 5000):
        assert load("x2", path)[0] in (400, 404), path
    for name in ("tiny", "sum-" + "0" * 64):
        assert load(name, "a")[0] == 409
    for name in ("", "../x", "x y", "-x", "x" * 200, 5):
        assert load(name, "a")[0] == 400, name
    status, said = load("x3", "empty")
    assert (status, str(folder) in said) == (400, False)
    for name in ("new", "x"):
        assert line.ask("/v1/unload_lora_adapter", json.dumps({"lora_name": name}).encode())[0] == 200
    assert line.ask("/v1/unload_lora_adapter", b'{"lora_name": "new"}')[0] == 404
    assert line.ask("/v1/unload_lora_adapter", b'{"lora_name": "tiny"}')[0] == 404


def test_other_addresses_and_methods(line: Line) -> None:
    assert line.ask("/v1/embeddings", b"{}")[0] == 404
    assert line.ask("/docs", None)[0] == 404
    assert line.ask("/v1/completions", None)[0] == 405
    assert line.ask("/v1/completions", b"{}", method="DELETE")[0] == 405
    status, body, headers = line.ask("/health", None)
    assert (status, body) == (200, {"status": "running"})
    assert headers["x-content-type-options"] == "nosniff"
    assert line.ask("/ready", None)[:2] == (200, {"status": "ready"})
    assert "/v1/completions" in line.ask("/openapi.json", None)[1]["paths"]


@pytest.mark.parametrize(
    "raw",
    [
        b"hello\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
        b"POST /health HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http_is_refused(raw: bytes, served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as sent:
        sent.sendall(raw)
        first = sent.recv(65536)
    assert first == b"" or first.split()[1] in (b"400", b"408", b"403", b"405", b"431"), first[:200]
