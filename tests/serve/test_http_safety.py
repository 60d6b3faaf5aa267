"""Who may use the server, from where, with how much, and what the log says."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import http_server
import openai
import pytest
from http_server import Served, until
from serving import save

from reparam.serve import Limits
from reparam.serve.http.auth import VARIABLE, Gate, Keys, check_host, is_loopback, read_keys
from reparam.serve.http.errors import Problem

ONE, TWO = "first-key-0123456789", "second-key-0123456789"


@pytest.fixture(scope="module")
def keyed(folder: Path) -> Iterator[Served]:
    with http_server.serving(
        folder, keys=(ONE, TWO), key_requests=3, body_bytes=5000, body_seconds=1.5, max_tokens=100
    ) as running:
        yield running


def ask(
    served: Served, path: str, body: bytes | None = None, method: str | None = None, **headers: str
) -> tuple[int, Any, dict[str, str]]:
    line = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    line.request(
        method or ("GET" if body is None else "POST"), path, body, {"content-type": "application/json", **given}
    )
    answer = line.getresponse()
    text = answer.read()
    line.close()
    found = {name.lower(): value for name, value in answer.getheaders()}
    return answer.status, json.loads(text) if "json" in found.get("content-type", "") else text, found


@pytest.mark.parametrize(
    "header", [None, "", ONE, f"Basic {ONE}", "Bearer", f"Bearer {ONE}x", f"Bearer {ONE[:-1]}", "Bearer \xff"]
)
def test_nothing_that_tells_anything_is_answered_without_a_key(header: str | None, keyed: Served) -> None:
    headers = {} if header is None else {"authorization": header}
    for path in (
        "/v1/models",
        "/v1/models/a",
        "/metrics",
        "/openapi.json",
        "/v1/nothing",
        "//",
        "/v1/../health",
        "/Health",
    ):
        status, body, found = ask(keyed, path, **headers)
        assert status == 401, path
        assert body["error"]["code"] == "invalid_api_key"
        assert found["www-authenticate"] == "Bearer"
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        assert ask(keyed, path, b"not even JSON", **headers)[0] == 401
    for path in ("/health", "/ready", "/"):
        assert ask(keyed, path, **headers)[0] == 200


def test_every_key_is_right(keyed: Served) -> None:
    for key in (ONE, TWO):
        made = keyed.client(key).completions.create(model="a", prompt="x", max_tokens=2)
        assert made.usage.completion_tokens == 2
        assert ask(keyed, "/metrics", authorization=f"bearer  {key}")[0] == 200


def test_loading_is_off_unless_it_is_allowed(keyed: Served) -> None:
    for path in ("load", "unload"):
        body = {"lora_name": "x", **({"lora_path": "a"} if path == "load" else {})}
        status, answer, _ = ask(
            keyed, f"/v1/{path}_lora_adapter", json.dumps(body).encode(), authorization=f"Bearer {ONE}"
        )
        assert (status, answer["error"]["code"]) == (403, "loading_off")


def test_keys_do_not_share_the_cache(keyed: Served) -> None:
    def cached(key: str) -> int:
        prompt = list(range(10, 110))
        usage = keyed.client(key).completions.create(model="tiny", prompt=prompt, max_tokens=2, temperature=0).usage
        return usage.prompt_tokens_details.cached_tokens

    assert [cached(ONE), cached(TWO)] == [0, 0]
    assert min(cached(ONE), cached(TWO)) >= 64


def test_a_key_has_so_many_answers_at_once_and_others_are_not_held_up(keyed: Served) -> None:
    client = keyed.client(ONE)
    open_ = client.completions.create(model="a", prompt="x", max_tokens=100, n=3, stream=True)
    next(iter(open_))
    with pytest.raises(openai.RateLimitError) as raised:
        client.completions.create(model="a", prompt="x", max_tokens=1)
    assert raised.value.response.headers["retry-after"] == "1"
    assert keyed.client(TWO).completions.create(model="a", prompt="x", max_tokens=1)
    open_.close()
    until(lambda: not keyed.server.guard.gate)
    assert client.completions.create(model="a", prompt="x", max_tokens=1)


def test_long_bodies_get_413_at_once_and_slow_ones_408(keyed: Served) -> None:
    key = f"Bearer {ONE}"
    assert ask(keyed, "/v1/completions", b"x" * 5001, authorization=key)[0] == 413
    exact = json.dumps({"model": "a", "prompt": [5], "max_tokens": 1}).encode().ljust(5000)
    assert ask(keyed, "/v1/completions", exact, authorization=key)[0] == 200
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: {key}\r\nContent-Type: application/json\r\n"
    for more, status in (
        ("Content-Length: 999999999999\r\n\r\n", b"413"),
        (f"Transfer-Encoding: chunked\r\n\r\n1389\r\n{'x' * 5001}\r\n", b"413"),
        ("Content-Length: 50\r\n\r\nabc", b"408"),
    ):
        with socket.create_connection(("127.0.0.1", keyed.port), timeout=30) as sent:
            sent.sendall((head + more).encode())
            assert sent.recv(65536).split()[1] == status


def test_pages_of_others_cannot_use_a_server_without_keys(folder: Path) -> None:
    body = json.dumps({"model": "a", "prompt": "x", "max_tokens": 1}).encode()
    local = ("localhost", "127.0.0.1", "::1")
    with http_server.serving(folder, hosts=local) as running:
        own = f"127.0.0.1:{running.port}"
        for headers in (
            {"host": "evil.example"},
            {"host": f"evil.example:{running.port}"},
            {"host": "127.0.0.1.evil.example"},
            {"host": "["},
            {"origin": "https://evil.example"},
            {"origin": "null"},
            {"origin": f"http://127.0.0.1:{running.port + 1}"},
            {"sec_fetch_site": "cross-site"},
            {"sec_fetch_site": "same-site"},
        ):
            status, _, found = ask(running, "/v1/completions", body, **headers)
            assert status == 403, headers
            assert "access-control-allow-origin" not in found
        for headers in (
            {"host": f"localhost:{running.port}"},
            {"origin": f"http://{own}"},
            {"sec_fetch_site": "same-origin"},
        ):
            assert ask(running, "/v1/completions", body, **headers)[0] == 200, headers
        # What a form of another page could send without asking first: no JSON type.
        assert ask(running, "/v1/completions", body, content_type="text/plain")[0] in (400, 415)
        preflight = ask(running, "/v1/completions", method="OPTIONS", access_control_request_method="POST")
        assert "access-control-allow-origin" not in preflight[2]


def test_links_that_lead_out_of_the_folder_are_not_followed(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    save(http_server.load(folder), tmp_path / "outside", seed=8)
    save(http_server.load(folder), root / "inside", seed=9)
    with http_server.serving(folder, root=root, loading=True) as running:
        (root / "link").symlink_to(tmp_path / "outside")
        (root / "files").mkdir()
        for file in (tmp_path / "outside").iterdir():
            (root / "files" / file.name).symlink_to(file)
        (root / "own").symlink_to(root / "inside")  # inside of the folder: a link is fine
        for path, status in (("link", 403), ("files", 403), ("link/../inside", 403), ("own", 200)):
            body = json.dumps({"lora_name": f"n{status}", "lora_path": path}).encode()
            assert ask(running, "/v1/load_lora_adapter", body)[0] == status, path
        # The folder of an adapter becomes a link after the start.
        client = running.client()
        assert client.completions.create(model="n200", prompt="x", max_tokens=1)
        for file in (root / "inside").iterdir():
            file.unlink()
            file.symlink_to(tmp_path / "outside" / file.name)
        with pytest.raises(openai.BadRequestError, match="leads out of"):
            client.completions.create(model="inside", prompt="x", max_tokens=1)


def test_pickles_are_not_read(folder: Path, tmp_path: Path) -> None:
    save(http_server.load(folder), tmp_path / "a", seed=8)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}')
    (tmp_path / "bad" / "adapter_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n(S'touch pwned'\ntR.")
    with (
        http_server.serving(folder, root=tmp_path) as running,
        pytest.raises(openai.BadRequestError, match="safetensors") as raised,
    ):
        running.client().completions.create(model="bad", prompt="x")
    assert str(tmp_path) not in str(raised.value)
    assert not Path("pwned").exists()


def test_a_slow_answer_ends_in_time(folder: Path) -> None:
    limits = Limits(requests=2, step_tokens=16, cache_tokens=1024, open_requests=2)
    with http_server.serving(folder, limits=limits, seconds=1.0) as running:
        client = running.client()
        with pytest.raises(openai.BadRequestError, match="at most 2 for one key"):
            client.completions.create(model="a", prompt="x", n=3, max_tokens=2)
        with running.engine._loop.quiet():
            began = time.monotonic()
            with pytest.raises(openai.InternalServerError, match="not complete after 1 seconds") as raised:
                client.completions.create(model="a", prompt="x", max_tokens=5)
            assert (raised.value.status_code, raised.value.code) == (503, "timeout")
            with pytest.raises(openai.APIError, match="not complete after 1 seconds"):
                list(client.completions.create(model="a", prompt="x", max_tokens=5, stream=True))
            assert time.monotonic() - began < 30
        until(lambda: not len(running.engine._loop))
        assert client.completions.create(model="a", prompt="x", max_tokens=2).usage.completion_tokens == 2


def test_a_queue_that_other_keys_have_filled_gets_429(folder: Path) -> None:
    limits = Limits(requests=2, step_tokens=16, cache_tokens=1024, open_requests=2)
    asked: dict[str, Any] = {"model": "a", "prompt": "x", "max_tokens": 2}
    with http_server.serving(folder, limits=limits, keys=(ONE, TWO)) as running:
        with ThreadPoolExecutor(1) as pool:
            with running.engine._loop.quiet():
                first = pool.submit(running.client(ONE).completions.create, n=2, **asked)
                until(lambda: len(running.engine._loop) == 2)
                with pytest.raises(openai.RateLimitError, match="2 open requests") as raised:
                    running.client(TWO).completions.create(**asked)
            assert len(first.result(60).choices) == 2
        assert raised.value.response.headers["retry-after"]
        assert running.client(TWO).completions.create(**asked)


def test_the_log_has_no_prompts_answers_or_keys(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), http_server.serving(folder, keys=(ONE,)) as running:
        client = running.client(ONE)
        made = client.chat.completions.create(
            model="a", messages=[{"role": "user", "content": "secretprompt"}], max_tokens=8, temperature=0
        )
        list(client.completions.create(model="b", prompt="secretprompt", max_tokens=3, stream=True))
        for bad in (
            {"prompt": {"secretprompt": 1}},
            {"prompt": "x", "secretprompt": 1},
            {"prompt": "secretprompt", "n": 0},
        ):
            ask(running, "/v1/completions", json.dumps({"model": "a", **bad}).encode(), authorization=f"Bearer {ONE}")
        ask(running, "/v1/completions?secretprompt=1", b"{}", authorization="Bearer secretprompt")
        ask(running, "/secretprompt", authorization=f"Bearer {ONE}")
        until(lambda: sum("POST" in r.getMessage() for r in caplog.records if r.name == "reparam.serve.http") >= 6)
    own = [r.getMessage() for r in caplog.records if r.name.startswith(("reparam", "uvicorn", "sse_starlette"))]
    text = "\n".join(own)
    assert "secretprompt" not in text
    assert ONE not in text
    assert (made.choices[0].message.content or "x") not in text
    assert any("POST /v1/chat/completions 200" in line and "model=a" in line for line in own)


def test_another_host_needs_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org", "127.0.0.1.example.org", ""):
        with pytest.raises(ValueError, match="needs a key"):
            check_host(host, ())
        check_host(host, (ONE,))
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        assert is_loopback(host)
        check_host(host, ())


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# two keys\n{ONE}\n\n  {TWO}\n{ONE}\n")
    file.chmod(0o600)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_keys(file, {}) == (ONE, TWO)
        assert read_keys(file, {VARIABLE: "third-key-0123456789"}) == (ONE, TWO, "third-key-0123456789")
        assert read_keys(None, {}) == ()
    file.chmod(0o644)
    with pytest.warns(UserWarning, match="chmod 600"):
        read_keys(file, {})
    for text, said in (
        ("", "holds no key"),
        ("short\n", "line 1: a key has at least 16"),
        (f"{ONE} {TWO}\n", "line 1"),
    ):
        file.write_text(text)
        file.chmod(0o600)
        with pytest.raises(ValueError, match=said) as raised:
            read_keys(file, {})
        assert ONE not in str(raised.value)
    for value in ("", "short", "with a space in it 0"):
        with pytest.raises(ValueError, match=VARIABLE):
            read_keys(None, {VARIABLE: value})
    with pytest.raises(ValueError, match="no keys can be read"):
        read_keys(tmp_path / "none", {})


def test_keys_are_compared_as_a_whole() -> None:
    keys = Keys((ONE, TWO))
    assert keys.owner(f"Bearer {ONE}") != keys.owner(f"Bearer {TWO}")
    assert ONE not in keys.owner(f"Bearer {ONE}")
    for wrong in (f"Bearer {ONE}{TWO}", f"Bearer {ONE},{TWO}", "Bearer ", "Bearer *"):
        with pytest.raises(Problem):
            keys.owner(wrong)
    gate = Gate(2)
    with gate.open("a", 2), gate.open("b", 1), pytest.raises(Problem), gate.open("a", 1):
        pass
    assert not gate
