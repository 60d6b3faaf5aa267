"""What the front of several engines does: the same answers as one server's, and engines that die. Without a cluster."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

pytest.importorskip("ray.serve")

from reparam.serve import Request
from reparam.serve.http.guard import Guard
from reparam.serve.http.metrics import Traffic
from reparam.serve.http.relay import TRIES, Relay
from reparam.serve.ray import TOLD, Plan, Replica, application

ASKED: dict[str, Any] = {"model": "a", "prompt": "def area(", "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def plan(folder: Path) -> Plan:
    limits = {"requests": 8, "step_tokens": 64, "cache_tokens": 2048}
    return Plan(base=str(folder / "tiny"), adapters=str(folder / "adapters"), local=True, limits=limits)


@pytest.fixture(scope="module")
def replica(plan: Plan) -> Any:
    made = Replica(plan)
    yield made
    made.engine.close()


def ask(replica: Replica, plan: Plan, dies: list[int], path: str = "/v1/completions", **more: Any) -> tuple[int, str]:
    """The answer; `dies` are the numbers of messages after which the engine dies, one for each try."""
    left = list(dies)

    async def call(*given: Any) -> AsyncIterator[Any]:
        at, count = (left.pop(0) if left else -1), 0
        async for message in replica.call(*given):
            if message["type"] == TOLD:
                continue
            if count == at:
                raise ConnectionError("the engine has died")
            count += 1
            yield message

    async def run() -> tuple[int, str]:
        traffic = Traffic()
        guard = Guard(Relay(call, plan.served, traffic), plan.served, traffic, 64)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://localhost") as client:
            found = await client.post(path, json={**ASKED, **more})
            return found.status_code, found.text

    return asyncio.run(run())


def test_answers_and_errors_are_those_of_the_engine(replica: Replica, plan: Plan) -> None:
    for name in ("a", "b", "dora"):
        alone = replica.engine.answer([Request("def area(", name, max_new_tokens=6)])[0]
        status, text = ask(replica, plan, [], model=name)
        body = json.loads(text)
        assert (status, body["system_fingerprint"], body["choices"][0]["text"]) == (200, alone.digest, alone.text)
    for more, status in (({"model": "none"}, 404), ({"min_p": 1}, 400), ({"model": {}}, 400), ({"model": "a+a*"}, 400)):
        found, text = ask(replica, plan, [], **more)
        assert found == status, text
        assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}


def test_a_request_is_sent_again_if_its_engine_dies_before_anything_was_sent(replica: Replica, plan: Plan) -> None:
    right = json.loads(ask(replica, plan, [])[1])["choices"]
    status, text = ask(replica, plan, [0, 1])  # before the head, and between the head and the body
    assert (status, json.loads(text)["choices"]) == (200, right)
    status, text = ask(replica, plan, [0] * TRIES)
    assert (status, json.loads(text)["error"]["code"]) == (503, "answer_failed")


def test_a_stream_that_has_begun_ends_with_an_error(replica: Replica, plan: Plan) -> None:
    status, text = ask(replica, plan, [3], stream=True)
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert status == 200
    assert json.loads(events[-1])["error"]["code"] == "answer_failed"
    assert not any(json.loads(event)["choices"][0]["finish_reason"] for event in events[:-1])
    assert "[DONE]" not in events


def test_other_bytes_than_those_of_the_other_engines_are_refused(replica: Replica, plan: Plan) -> None:
    from reparam.serve.http.guard import Caller

    async def run() -> list[Any]:
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
        return [message async for message in replica.call(scope, b"{}", Caller("x"), {"a": "0" * 64})]

    assert asyncio.run(run())[0]["status"] == 409


def test_plans_that_cannot_be_are_refused(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REPARAM_API_KEY", raising=False)
    for more, said in (
        ({"local": False}, "needs a key"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas=2 is below replicas=3"),
        ({"settings": {"keys": ["x"]}}, "keys cannot be set here"),
    ):
        with pytest.raises(ValueError, match=said):
            application(plan.model_copy(update=more))
    with pytest.raises(ValueError, match="unknown"):
        Plan(base="x", unknown=1)
