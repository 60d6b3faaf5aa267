"""Two engines on a Ray cluster, one killed under load: no answer is wrong. A minute of CPU time: in the full suite."""

from __future__ import annotations

import collections
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from sampled import FULL

pytest.importorskip("ray.serve")
pytestmark = pytest.mark.skipif(not FULL, reason="starts a cluster; set REPARAM_TESTS=full")
ENGINE = "ServeReplica:reparam:engines"


@pytest.fixture
def server(folder: Path) -> Any:
    """The port and the process of `reparam serve --ray` with two engines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", folder / "tiny", "--adapters", folder / "adapters", "--ray", "--replicas", 2, "--port", port]
    process = subprocess.Popen([sys.executable, "-m", "reparam", *map(str, words)])
    try:
        until = time.monotonic() + 240
        while time.monotonic() < until and process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5).read()
                break
            except OSError:
                time.sleep(0.5)
        yield port, process
    finally:
        process.kill()
        process.wait()


def test_an_engine_dies_under_load(server: tuple[int, Any]) -> None:
    port, process = server
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0, timeout=120)

    def ask(model: str, **more: Any) -> Any:
        return client.completions.create(model=model, prompt="def area(", max_tokens=24, temperature=0, **more)

    models = ["tiny", *(m.id for m in client.models.list() if m.id != "tiny")]
    right = {m: (r.system_fingerprint, r.choices[0].text) for m in models for r in [ask(m)]}
    assert len(set(right.values())) == len(right)
    seen: collections.Counter[str] = collections.Counter()
    killed, until = threading.Event(), time.monotonic() + 60

    def work(own: int) -> None:
        after = 0
        while after < 10 and time.monotonic() < until:
            after += killed.is_set()
            model = models[own % len(models)]
            try:
                if own % 2:
                    parts = list(ask(model, stream=True))
                    given = parts[-1].system_fingerprint, "".join(p.choices[0].text for p in parts if p.choices)
                else:
                    answer = ask(model)
                    given = answer.system_fingerprint, answer.choices[0].text
                seen["right" if given == right[model] else "wrong"] += 1
            except openai.APIError as error:  # before the answer, or an event within it
                seen["error" if getattr(error, "status_code", 503) == 503 else f"status {error}"] += 1

    threads = [threading.Thread(target=work, args=(own,)) for own in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    engines = [p for p in psutil.Process(process.pid).children(recursive=True) if ENGINE in " ".join(p.cmdline())]
    assert len(engines) == 2
    os.kill(engines[0].pid, signal.SIGKILL)
    killed.set()
    for thread in threads:
        thread.join()
    assert seen.keys() <= {"right", "error"}, seen
    assert seen["right"] >= 40
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
