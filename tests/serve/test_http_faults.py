"""Clients that vanish or read slowly, adapters that change under load, steps that fail, and the end of the server."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import http_server
import openai
import pytest
from http_server import Served, until
from serving import save

from reparam.serve.http.run import Server, bound
from reparam.serve.http.settings import Settings

LONG: dict[str, Any] = {"model": "a", "prompt": "def area(", "max_tokens": 200, "temperature": 0}


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with http_server.serving(folder, loading=True, send_seconds=1.0) as running:
        yield running


def answers(served: Served, count: int, **more: Any) -> list[str]:
    """The answers to requests at once, over the base and both adapters."""
    client = served.client()

    def one(i: int) -> str:
        asked: dict[str, Any] = {"prompt": f"def f{i % 2}(", "max_tokens": 10, "temperature": 0, **more}
        return client.completions.create(**{"model": ["tiny", "a", "b"][i % 3], **asked}).choices[0].text

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def idle(served: Served) -> bool:
    residents = served.engine._store._residents.values()
    return not len(served.engine._loop) and not served.server.guard.gate and not any(r.leases for r in residents)


def raw(body: dict[str, Any]) -> bytes:
    """A request as it is sent."""
    text = json.dumps(body)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(text)}"
    return f"{head}\r\n\r\n{text}".encode()


def started(served: Served, body: dict[str, Any]) -> socket.socket:
    """A connection that has sent a request, and read the beginning of its answer if it is a stream."""
    sent = socket.create_connection(("127.0.0.1", served.port), timeout=30)
    sent.sendall(raw(body))
    if body.get("stream"):
        assert sent.recv(200).startswith(b"HTTP/1.1 200")
    return sent


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_who_vanishes_frees_everything(stream: bool, n: int, served: Served) -> None:
    expected = answers(served, 3)
    with served.engine._loop.quiet() if not stream else _nothing():
        sent = started(served, {**LONG, "n": n, "stream": stream})
        until(lambda: len(served.engine._loop) == n or stream)
        sent.close()
    before = served.engine.metrics().ended.get("length", 0)
    until(lambda: idle(served))
    assert served.engine.metrics().ended.get("length", 0) == before or stream
    assert answers(served, 3) == expected


class _nothing:  # noqa: N801
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def test_who_does_not_read_holds_up_nobody_and_is_left(served: Served) -> None:
    expected = answers(served, 3)
    body = {**LONG, "n": 16, "logprobs": 20, "stream": True}  # more than the connection's buffers take
    sent = socket.socket()
    sent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sent.connect(("127.0.0.1", served.port))
    sent.sendall(raw(body))
    until(lambda: len(served.engine._loop) > 8)
    assert answers(served, 3) == expected
    until(lambda: idle(served), seconds=90)
    sent.close()


def test_an_adapter_is_reloaded_unloaded_and_deleted_under_load(folder: Path, tmp_path: Path) -> None:
    """Every answer is that of the adapter whose digest it names, and a name that is gone is 404."""
    root, spare = tmp_path / "root", tmp_path / "spare"
    model = http_server.load(folder)
    for seed in range(3):
        save(model, spare / f"v{seed}", seed=20 + seed)
    shutil.copytree(spare / "v0", root / "live")
    shutil.copytree(spare / "v1", root / "other")
    shutil.copytree(spare / "v2", root / "last")
    asked: dict[str, Any] = {"prompt": "def area(", "max_tokens": 12, "temperature": 0}
    with http_server.serving(folder, root=root, loading=True) as running:
        client = running.client()
        made = [client.completions.create(model=name, **asked) for name in ("live", "other", "last")]
        right = {one.system_fingerprint: one.choices[0].text for one in made}
        assert len(set(right.values())) == 3
        found: list[tuple[str, str]] = []
        missing: list[str] = []
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                try:
                    one = client.completions.create(model="live", **asked)
                    found.append((one.system_fingerprint, one.choices[0].text))
                except openai.NotFoundError as error:
                    missing.append(str(error.code))

        def post(what: str, **body: Any) -> int:
            line = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
            line.request("POST", f"/v1/{what}_lora_adapter", json.dumps(body), {"content-type": "application/json"})
            return line.getresponse().status

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for path in ("other", "last", "live", "other"):
                count = len(found)
                assert post("load", lora_name="live", lora_path=path, load_inplace=True) == 200
                until(lambda count=count: len(found) > count + 4)
            shutil.rmtree(root / "other")  # what is loaded is served on
            count = len(found)
            until(lambda: len(found) > count + 4)
            assert post("load", lora_name="live", lora_path="other", load_inplace=True) == 404
            assert post("unload", lora_name="live") == 200
            until(lambda: len(missing) > 4)
            assert post("load", lora_name="live", lora_path="last") == 200
            count = len(found)
            until(lambda: len(found) > count + 4)
        finally:
            stop.set()
            for thread in threads:
                thread.join(60)
        assert set(missing) == {"model_not_found"}
        assert {digest for digest, _ in found} == set(right)
        assert all(right[digest] == text for digest, text in found)


def test_files_that_are_gone_are_told_and_the_others_go_on(folder: Path, tmp_path: Path) -> None:
    for name in ("gone", "here"):
        save(http_server.load(folder), tmp_path / name, seed=4)
    with http_server.serving(folder, root=tmp_path) as running:
        shutil.rmtree(tmp_path / "gone")
        client = running.client()
        with pytest.raises(openai.BadRequestError, match="no such folder") as raised:
            client.completions.create(model="gone", prompt="x")
        assert str(tmp_path) not in str(raised.value)
        assert client.completions.create(model="here", prompt="x", max_tokens=2).usage.completion_tokens == 2


@pytest.mark.parametrize("first", [0, 6])
def test_after_a_failed_step_everything_is_right(first: int, served: Served) -> None:
    expected = answers(served, 6)
    left, seen = [1], [0]

    def fail(*_: Any) -> None:
        seen[0] += 1
        if seen[0] > first and left:
            left.clear()
            raise RuntimeError("injected")

    hook = served.engine.model.model.layers[1].register_forward_pre_hook(fail)
    client = served.client()
    try:
        with ThreadPoolExecutor(1) as pool:
            with served.engine._loop.quiet():
                whole = pool.submit(_streamed, client)
                until(lambda: len(served.engine._loop) == 1)
            text, ends, error = whole.result(60)
    finally:
        hook.remove()
    assert not left
    if first:  # tokens had been sent: the stream ends with an error, and tells no end of the answer
        assert "injected" in str(error)
        assert ends == []
    else:  # nothing had been sent: the request was begun again
        assert error is None
        assert ends == ["length"]
    until(lambda: served.engine.ready)
    assert client.completions.create(**{**LONG, "max_tokens": 30}).choices[0].text.startswith(text[:5])
    assert answers(served, 6) == expected
    assert idle(served)


def _streamed(client: openai.OpenAI) -> tuple[str, list[str], Exception | None]:
    text, ends = "", []
    try:
        for part in client.completions.create(stream=True, **{**LONG, "max_tokens": 30}):
            text += part.choices[0].text
            ends += [part.choices[0].finish_reason] if part.choices[0].finish_reason else []
    except openai.APIError as error:
        return text, ends, error
    return text, ends, None


def test_while_the_engine_starts_again_requests_get_503(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.engine._loop, "state", "restarting")
    with pytest.raises(openai.InternalServerError) as raised:
        served.client().completions.create(model="tiny", prompt="x")
    assert raised.value.status_code == 503
    assert raised.value.response.headers["retry-after"]
    line = http.client.HTTPConnection("127.0.0.1", served.port)
    for path, status in (("/ready", 503), ("/health", 200)):
        line.request("GET", path)
        answer = line.getresponse()
        answer.read()
        assert answer.status == status


def end(folder: Path, seconds: float, act: Callable[[Server, int], None]) -> tuple[Server, list[Any]]:
    """Serve in a thread, begin a stream, and stop; what the stream had."""
    from reparam.serve import Engine

    got: list[Any] = []
    with Engine(http_server.load(folder), http_server.tokenizer(folder), adapters=folder / "adapters") as engine:
        listener = bound("127.0.0.1", 0)
        port = listener.getsockname()[1]
        server = Server(engine, Settings("tiny", root=folder / "adapters", drain_seconds=seconds))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        until(lambda: server.started)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0)

        def read() -> None:
            try:
                for part in client.completions.create(stream=True, **LONG):
                    got.append(part.choices[0].finish_reason)
            except openai.APIError as error:
                got.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        until(lambda: got)
        act(server, port)
        for each in (reader, thread):
            each.join(60)
            assert not each.is_alive()
    return server, got


def test_a_server_that_stops_finishes_its_answers_and_takes_no_more(folder: Path) -> None:
    refused: list[int | str] = []

    def act(server: Server, port: int) -> None:
        kept = http.client.HTTPConnection("127.0.0.1", port)
        kept.request("GET", "/health")
        kept.getresponse().read()
        server._stop(signal.SIGTERM, None)
        try:
            kept.request("POST", "/v1/completions", "{}", {"content-type": "application/json"})
            refused.append(kept.getresponse().status)
        except OSError:
            refused.append("closed")

    server, got = end(folder, 60, act)
    assert got[-1] == "length"
    assert refused[0] in (503, "closed")
    assert server.signal == signal.SIGTERM


def test_a_server_whose_time_to_stop_is_over_ends_answers_with_an_error(folder: Path) -> None:
    def act(server: Server, port: int) -> None:
        server._engine.model.register_forward_pre_hook(lambda *_: time.sleep(0.1))
        server._stop(signal.SIGTERM, None)

    _, got = end(folder, 0.3, act)
    assert isinstance(got[-1], openai.APIError)
    assert "closed" in str(got[-1])
    assert not any(got[:-1])


def test_a_second_interrupt_ends_at_once(folder: Path) -> None:
    def act(server: Server, port: int) -> None:
        server._engine.model.register_forward_pre_hook(lambda *_: time.sleep(0.1))
        server._stop(signal.SIGINT, None)
        server._stop(signal.SIGINT, None)

    server, got = end(folder, 600, act)
    assert isinstance(got[-1], openai.APIError)
    assert server.signal == signal.SIGINT
