"""A step that fails, a caller that leaves: nobody waits in vain, nobody gets another answer, and everything goes on."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from serving import SMALL, alone, prompts, save

import reparam
from reparam.serve import Engine, Request, Token


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("a", "b")):
        save(models.llama(), root / name, seed=seed)
    return root


@pytest.fixture
def engine(root: Path) -> Iterator[Engine]:
    with Engine(models.llama(), adapters=root, limits=SMALL) as made:
        yield made


class Faults:
    """Makes the model's steps fail, from step `first`, so many times."""

    def __init__(self, engine: Engine, first: int, times: int = 1) -> None:
        self.left, self.first, self.seen = times, first, 0
        self.hook = engine.model.model.layers[1].register_forward_pre_hook(self.count)

    def count(self, *_: Any) -> None:
        self.seen += 1
        if self.seen > self.first and self.left:
            self.left -= 1
            raise RuntimeError("injected")


def lengths_of(engine: Engine, texts: list[list[int]], names: list[str | None]) -> list[Any]:
    """Stream all; the tokens of each, or its error."""

    async def one(text: list[int], name: str | None) -> list[int]:
        return [token.id async for token in engine.generate(text, adapter=name, max_new_tokens=12)]

    async def together() -> list[Any]:
        with engine._loop.quiet():  # all requests are there when the first step begins
            tasks = [asyncio.create_task(one(text, name)) for text, name in zip(texts, names, strict=True)]
            while len(engine._loop) < len(texts):
                await asyncio.sleep(0.01)
        return await asyncio.gather(*tasks, return_exceptions=True)

    return asyncio.run(together())


@pytest.mark.parametrize("first", [0, 1, 4])
def test_after_a_failed_step_everything_is_right(engine: Engine, root: Path, first: int) -> None:
    texts, names = prompts(6, longest=20), [None, "a", "b"] * 2
    answer = alone(models.llama(), root)
    expected = [answer(text, name, 12) for text, name in zip(texts, names, strict=True)]
    engine.answer([Request([3], name, 1) for name in names])
    Faults(engine, first)
    found = lengths_of(engine, texts, names)
    assert all(
        one == whole or (isinstance(one, reparam.AnswerFailed) and "injected" in str(one))
        for one, whole in zip(found, expected, strict=True)
    )
    if first == 0:  # nothing had been sent
        assert found == expected
    if first == 4:
        assert any(isinstance(one, reparam.AnswerFailed) for one in found)
    assert lengths_of(engine, texts, names) == expected
    assert engine._loop.restarts == 1
    assert engine.state == "running"


def test_a_request_at_which_every_step_fails_ends_with_an_error(engine: Engine) -> None:
    faults = Faults(engine, 0, times=10**6)
    with pytest.raises(reparam.AnswerFailed, match="injected"):
        engine.answer([Request([3, 4], None, 4)])
    faults.left = 0
    assert len(engine.answer([Request([3, 4], None, 4)])[0].ids) == 4
    assert not engine._loop._tickets
    assert all(resident.leases == 0 for resident in engine._store._residents.values())


def test_an_adapter_loads_while_the_engine_starts_again(engine: Engine, root: Path) -> None:
    Faults(engine, 2, times=2)
    thread = threading.Thread(target=lengths_of, args=(engine, prompts(4), [None] * 4))
    thread.start()
    for i in range(4):
        save(models.llama(), root.parent / f"late{i}", seed=10 + i, targets=["down_proj", "k_proj"])
        engine.load(f"late{i}", root.parent / f"late{i}")
    thread.join(60)
    assert not thread.is_alive()
    assert len({tuple(engine.answer([Request([5, 6, 7], f"late{i}", 8)])[0].ids) for i in range(4)}) > 1


def test_scores_that_are_not_numbers_end_only_their_request(root: Path) -> None:
    model = models.llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[90] = torch.nan
    with Engine(model, adapters=root, limits=SMALL) as engine:
        with pytest.raises(reparam.AnswerFailed, match="not numbers"):
            engine.answer([Request([3, 90], None, 4)])
        expected = engine.answer([Request([3, 4], None, 4)])[0]
        found = lengths_of(engine, [[3, 90], [3, 4]], [None, None])
        assert isinstance(found[0], reparam.AnswerFailed)
        assert found[1][:4] == expected.ids
        assert engine._loop.restarts == 0


@pytest.mark.parametrize("how", ["break", "cancel"])
def test_who_leaves_frees_the_slot_and_ends_the_wait(engine: Engine, how: str) -> None:
    async def leave() -> None:
        got: list[Token] = []

        async def read() -> None:
            async for token in engine.generate([3, 4, 5], adapter="a", max_new_tokens=50):
                got.append(token)
                if how == "break" and len(got) == 2:
                    break

        task = asyncio.create_task(read())
        while len(got) < 2:
            await asyncio.sleep(0)
        if how == "cancel":
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await asyncio.wait_for(task, 20)

    asyncio.run(leave())
    for _ in range(200):
        if not engine._loop._tickets:
            break
        threading.Event().wait(0.02)
    assert not engine._loop._tickets
    assert [resident.leases for resident in engine._store._residents.values()] == [0]
    assert not engine._loop._manager.batch_processor.scheduler.active_requests


def test_closing_ends_those_who_wait(root: Path) -> None:
    engine = Engine(models.llama(), adapters=root, limits=SMALL)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(lengths_of(engine, prompts(20), [None] * 20)))
    thread.start()
    while engine._loop.counters.steps < 3:
        threading.Event().wait(0.01)
    engine.close()
    thread.join(30)
    assert not thread.is_alive()
    assert any(isinstance(one, reparam.Unavailable) and "closed" in str(one) for one in found)
    engine.close()


def test_a_forgotten_engine_does_not_keep_the_process(tmp_path: Path) -> None:
    script = tmp_path / "forgotten.py"
    script.write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\nfrom reparam.serve import Engine, Request\n"
        "sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)\n"
        "engine = Engine(LlamaForCausalLM(LlamaConfig(vocab_size=97, eos_token_id=None, **sizes)))\n"
        "print(len(engine.answer([Request([3], None, 4)])[0].ids))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "4"), done.stderr
