"""The verb serve: what it prints, how it ends, and what it refuses before it loads anything."""

from __future__ import annotations

import json
import signal
import socket
import urllib.request
from pathlib import Path

import http_server
import pytest
from command import reparam
from served_command import serve


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return http_server.make_base(tmp_path_factory.mktemp("served"))


@pytest.mark.parametrize(("end", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_it_serves_until_a_signal(
    end: signal.Signals, code: int, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    answers = []

    def ask(port: int) -> None:
        body = json.dumps({"model": "a", "prompt": "def area(", "max_tokens": 3}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
        )
        answers.append(json.load(urllib.request.urlopen(request)))
        page = urllib.request.urlopen(f"http://localhost:{port}/")
        answers.append(page.headers["content-security-policy"])

    assert serve("tiny", "--adapters", "adapters", ask=ask, end=end) == code
    assert answers[0]["usage"]["completion_tokens"] == 3
    assert answers[1].startswith("default-src 'none'")
    told = capfd.readouterr()
    assert "serving tiny with 3 adapters (a; b; dora) on http://127.0.0.1:" in told.out
    assert "POST /v1/completions 200" in told.err
    assert "the server stops" in told.err
    assert "def area(" not in told.out + told.err


REFUSED = {
    "another host without a key": (["--host", "0.0.0.0"], 2, "needs a key"),
    "a host that is none": (["--host", "no such host", "--api-key-file", "KEYS"], 2, "no such address"),
    "loading without a folder": (["--allow-loading"], 2, "--adapters"),
    "no file of keys": (["--api-key-file", "nowhere"], 2, "nowhere: no keys can be read"),
    "a key on the command line": (["--api-key", "abc"], 2, "No such option"),
    "no folder of adapters": (["--adapters", "nowhere"], 2, "no such folder of adapters"),
    "a folder without adapters": (["--adapters", "tiny"], 2, "no adapter here"),
    "a storage that is none": (["--storage", "nf5"], 2, "nf5"),
    "sizes that exclude each other": (["--step-tokens", "32"], 2, "step_tokens=32 is below requests=64"),
    "no time": (["--seconds", "0"], 2, "seconds=0"),
    "a name of an adapter": (["--adapters", "adapters", "--name", "a"], 2, "--name"),
    "a name with a sum": (["--name", "a+b"], 2, "--name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_refuses(
    case: str, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "keys").write_text("0123456789abcdef\n")
    (folder / "keys").chmod(0o600)
    options, code, said = REFUSED[case]
    found = reparam("serve", "tiny", "--port", "0", *["keys" if option == "KEYS" else option for option in options])
    told = capfd.readouterr().err
    assert found == code, told
    assert said in told
    assert "Traceback" not in told


def test_a_port_in_use_is_told_before_the_base_is_loaded(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert reparam("serve", folder / "nothing", "--port", taken.getsockname()[1]) == 1
    told = capfd.readouterr().err
    assert "choose another port with --port" in told
    assert "nothing" not in told


def test_a_base_that_is_none_is_told(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert reparam("serve", folder / "adapters" / "a", "--port", "0") == 2
    assert "Traceback" not in capfd.readouterr().err
