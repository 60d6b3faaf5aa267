"""What a request can ask for besides tokens: texts that stop it, log probabilities, a part of the cache of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from serving import alone, prompts, save
from transformers import AutoTokenizer

import reparam
from reparam.serve import Engine, Limits, Request, Usage
from reparam.serve.counts import Counters

LIMITS = Limits(requests=8, step_tokens=128, cache_tokens=2048)
PROMPT = [5, 6, 7, 8]


def llama() -> Any:
    return models.llama(max_position_embeddings=128, vocab_size=4096)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(llama(), tmp_path_factory.mktemp("adapters") / "lora").parent


@pytest.fixture(scope="module")
def engine(root: Path) -> Iterator[Engine]:
    tokenizer = AutoTokenizer.from_pretrained(models.ASSETS / "tiny-python")
    with Engine(llama(), tokenizer, adapters=root, limits=LIMITS) as made:
        yield made


async def texts_of(engine: Engine, requests: list[Request]) -> list[tuple[str, Any, Usage]]:
    async def one(request: Request) -> tuple[str, Any, Usage]:
        stream = await engine.open(request)
        text = "".join([token.text async for token in stream])
        return text, stream.end, stream.usage

    return await asyncio.gather(*map(one, requests))


def test_a_text_stops_an_answer_where_it_begins_in_any_place_of_the_tokens(engine: Engine) -> None:
    whole = engine.answer([Request(PROMPT, "lora", 20, stop_tokens=[])])[0]
    decoded: Any = engine.tokenizer
    sofar = [decoded.decode(whole.ids[: n + 1]) for n in range(20)]
    assert whole.text == sofar[-1]
    stops = [whole.text[at : at + size] for at in (1, 9, 17, len(whole.text) - 6) for size in (1, 2, 5)]
    lists = [[stop] for stop in stops] + [["never there", stops[-1], stops[4]]]
    requests = [Request(PROMPT, "lora", 20, stop_tokens=[], stop=each) for each in lists]
    answers = engine.answer(requests)
    streamed = asyncio.run(texts_of(engine, requests))
    for each, answer, (text, end, usage) in zip(lists, answers, streamed, strict=True):
        first = next(n for n, held in enumerate(sofar) if any(stop in held for stop in each))
        cut = min(sofar[first].find(stop) for stop in each if stop in sofar[first])
        assert (answer.text, answer.end, answer.ids) == (whole.text[:cut], "stop", whole.ids[: first + 1])
        assert (text, end, usage.new) == (answer.text, "stop", first + 1)
    assert len({len(answer.ids) for answer in answers}) > 4


def test_a_text_that_only_begins_is_sent_in_the_end(engine: Engine) -> None:
    whole = engine.answer([Request(PROMPT, None, 12, stop_tokens=[])])[0]
    almost = [whole.text[-4:] + "!", whole.text[3:6] + "\0"]
    token = whole.ids[6]
    found = engine.answer(
        [
            Request(PROMPT, None, 12, stop_tokens=[], stop=almost),
            Request(PROMPT, None, 12, stop_tokens=[token], stop=almost),
        ]
    )
    assert (found[0].text, found[0].end) == (whole.text, "length")
    first = whole.ids.index(token)
    assert found[1].text == "".join(one.text for one in whole.tokens[:first])
    assert (found[1].end, found[1].ids) == ("stop", whole.ids[: first + 1])


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 50, "top_p": 0.9}])
def test_log_probabilities_are_those_of_the_model_before_the_settings(
    engine: Engine, root: Path, settings: dict[str, Any]
) -> None:
    model = llama()
    answer = alone(model, root)
    plain = Request(PROMPT, "lora", 8, stop_tokens=[], seed=3, **settings)
    request = Request(PROMPT, "lora", 8, stop_tokens=[], seed=3, logprobs=3, **settings)
    found, without, beside = engine.answer([request, plain, Request(PROMPT, None, 8, logprobs=0, stop_tokens=[])])
    torch.manual_seed(3)
    assert found.ids == without.ids == answer(PROMPT, "lora", 8, do_sample=bool(settings), **settings)
    with torch.no_grad():
        scores = model(torch.tensor([PROMPT + found.ids])).logits[0, len(PROMPT) - 1 : -1].double().log_softmax(-1)
    best = scores.topk(3)
    for place, token in enumerate(found.tokens):
        assert token.logprob == pytest.approx(scores[place, token.id].item(), abs=1e-4)
        assert [one for one, _ in token.top] == best.indices[place].tolist()
        assert [share for _, share in token.top] == pytest.approx(best.values[place].tolist(), abs=1e-4)
    assert all(token.logprob is None and token.top == () for token in without.tokens)
    assert all(token.logprob is not None and token.top == () for token in beside.tokens)


def test_only_requests_with_one_salt_and_one_adapter_share_cached_prompts(root: Path) -> None:
    text = (prompts(1, longest=100, seed=5)[0] * 100)[:100]
    with Engine(llama(), adapters=root, limits=LIMITS) as engine:
        found = [
            (name, salt, engine.answer([Request(text, name, 2, salt=salt)])[0].usage)
            for name, salt in [(None, ""), (None, "a"), (None, "a"), (None, "b"), ("lora", "a"), ("lora", "a")]
        ]
        assert [usage.cached for _, _, usage in found] == [0, 0, 96, 0, 0, 96]
        assert {(usage.prompt, usage.new) for _, _, usage in found} == {(100, 2)}
        assert engine.metrics().cached_tokens == 192


def test_what_is_counted(root: Path) -> None:
    with Engine(llama(), adapters=root, limits=LIMITS) as engine:
        assert engine.ready
        assert engine.metrics().steps == 0
        engine.answer([Request(PROMPT, name, 5, stop_tokens=[]) for name in (None, "lora", "lora")])
        asyncio.run(leave_early(engine))
        found = engine.metrics()
        assert found.ready
        assert (found.requests, found.prompt_tokens) == (4, 16)
        assert found.ended == {"length": 3, "cancelled": 1}
        assert found.adapters["lora"].new_tokens == 10
        assert (found.adapters[None].requests, found.adapters["lora"].requests) == (2, 2)
        assert found.new_tokens == 10 + found.adapters[None].new_tokens > 15
        assert (found.waiting, found.running, found.restarts) == (0, 0, 0)
        assert (found.adapters_ready, found.adapter_loads) == (1, 1)
        assert 0 < found.adapter_bytes == engine._store.nbytes()
        assert found.step_times[-1] == (float("inf"), found.steps)
        counts = [count for _, count in found.step_times]
        assert counts == sorted(counts)
        assert found.step_seconds > 0
        assert found.tokens_per_second > 0


async def leave_early(engine: Engine) -> None:
    stream = await engine.open(Request(PROMPT, None, 100, stop_tokens=[]))
    async for _ in stream:
        stream.cancel()
    assert stream.end == "cancelled"


def test_the_rate_of_tokens_is_that_of_the_last_seconds() -> None:
    now = 0.0
    counters = Counters(lambda: now)
    for now in range(40):  # noqa: B007  (the clock reads it)
        counters._new = 3
        counters.step(0.2)
    found = counters.metrics(ready=True, open_requests=0, waiting=0, restarts=0, store=(0, 0, 0))
    assert found.tokens_per_second == pytest.approx(3, rel=0.11)
    assert dict(found.step_times)[0.1] == 0
    assert dict(found.step_times)[0.25] == 40
    now = 100
    assert counters.metrics(ready=True, open_requests=0, waiting=0, restarts=0, store=(0, 0, 0)).tokens_per_second == 0


def test_an_engine_that_is_drained_ends_what_is_open_and_takes_nothing_else(root: Path) -> None:
    async def drained(engine: Engine) -> None:
        stream = await engine.open(Request(PROMPT, "lora", 40, stop_tokens=[]))
        await anext(aiter(stream))
        assert not await asyncio.to_thread(engine.drain, 0)
        assert (engine.ready, engine.state, engine.metrics().ready) == (False, "draining", False)
        with pytest.raises(reparam.Unavailable, match="about to stop"):
            await engine.open(Request(PROMPT, None, 2))
        assert await asyncio.to_thread(engine.drain)
        assert len([token async for token in stream]) == 39

    with Engine(llama(), adapters=root, limits=LIMITS) as engine:
        asyncio.run(drained(engine))
    assert engine.state == "closed"
