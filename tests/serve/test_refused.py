"""Requests that cannot be computed are refused before they reach a step, each with one sentence."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import models
import pytest
from serving import SMALL, prompts, save
from transformers import AutoTokenizer

import reparam
from reparam.serve import Engine, Limits, Request


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("adapters")
    save(models.llama(), root / "lora")
    with Engine(models.llama(), adapters=root, limits=SMALL) as made:
        yield made


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "no tokens": ({"prompt": []}, "the prompt has no tokens"),
    "beyond the vocabulary": ({"prompt": [3, 97]}, r"token 1 of the prompt is 97: .* from 0 to 96"),
    "negative": ({"prompt": [-1]}, "token 0 of the prompt is -1"),
    "a fraction": ({"prompt": [1.5]}, "token 0 of the prompt is 1.5"),
    "true": ({"prompt": [True]}, "token 0 of the prompt is True"),
    "a text without a tokenizer": ({"prompt": "def"}, "the engine has no tokenizer"),
    "beyond the context": ({"prompt": [3] * 60, "max_new_tokens": 5}, "together more than the 64 .* context"),
    "no new tokens": ({"max_new_tokens": 0}, "max_new_tokens=0"),
    "new tokens without an end": ({"max_new_tokens": None}, "max_new_tokens=None"),
    "half a token": ({"max_new_tokens": 1.5}, "max_new_tokens=1.5"),
    "a negative temperature": ({"temperature": -0.1}, "temperature=-0.1"),
    "no temperature": ({"temperature": math.nan}, "temperature=nan"),
    "an infinite temperature": ({"temperature": math.inf}, "temperature=inf"),
    "top_k 0": ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
    "top_p 0": ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0"),
    "top_p above 1": ({"temperature": 1.0, "top_p": 1.1}, "top_p=1.1"),
    "a negative seed": ({"temperature": 1.0, "seed": -1}, "seed=-1"),
    "a large seed": ({"temperature": 1.0, "seed": 2**64}, "seed=18446744073709551616"),
    "a stop token that is text": ({"stop_tokens": ["x"]}, "stop_tokens holds 'x'"),
    "a stop text without a tokenizer": ({"stop": ["x"]}, "stop has texts, but the engine has no tokenizer"),
    "one stop text": ({"stop": "x"}, r"stop='x': expected a list of texts, such as \['x'\]"),
    "an empty stop text": ({"stop": ["x", ""]}, r"stop\[1\] is '': expected a text of 1"),
    "a stop text that is a number": ({"stop": [3]}, r"stop\[0\] is 3"),
    "a long stop text": ({"stop": ["x" * 2000]}, r"stop\[0\] is 'xxx.* of 1 to 1,024"),
    "many stop texts": ({"stop": ["x"] * 65}, "stop has 65 texts; expected at most 64"),
    "more logprobs than can be": ({"logprobs": 21}, "logprobs=21: expected at most 20"),
    "negative logprobs": ({"logprobs": -1}, "logprobs=-1"),
    "logprobs that are true": ({"logprobs": True}, "logprobs=True"),
    "a salt that is a number": ({"salt": 3}, "salt=3: expected a text"),
    "a salt of half a character": ({"salt": "a\ud800"}, "salt holds half of a character .* at place 1"),
    "an unknown adapter": ({"adapter": "lorra"}, "no adapter is named 'lorra'.*did you mean 'lora'"),
    "an empty name": ({"adapter": ""}, "no adapter is named ''"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_computed_is_refused(engine: Engine, case: str) -> None:
    fields, message = CASES[case]
    steps = engine._loop.counters.steps
    with pytest.raises(reparam.Refused, match=message) as raised:
        engine.answer([Request([3, 4], None, 2), Request(**{"prompt": [3, 4], "max_new_tokens": 2, **fields})])
    assert "\n" not in str(raised.value)
    assert engine._loop.counters.steps == steps
    assert isinstance(raised.value, ValueError)
    assert isinstance(raised.value, reparam.UnknownAdapter) == (fields.get("adapter") is not None)


EDGES: dict[str, dict[str, Any]] = {
    "the smallest temperature": {"temperature": 5e-324},
    "a high temperature": {"temperature": 100},
    "more than the vocabulary": {"temperature": 1.0, "top_k": 10**9},
    "a tiny nucleus": {"temperature": 1.0, "top_p": 1e-300},
    "the largest seed": {"temperature": 1.0, "seed": 2**63 - 1},
    "the first and the last token": {"prompt": [0, 96]},
    "the whole context": {"prompt": [3] * 62},
    "a stop token beyond the vocabulary": {"stop_tokens": [10**6]},
}


@pytest.mark.parametrize("case", EDGES)
def test_what_is_just_allowed_does_not_end_the_loop(engine: Engine, case: str) -> None:
    found = engine.answer([Request(**{"prompt": [3, 4], "max_new_tokens": 2, **EDGES[case]})])[0]
    assert len(found.ids) == 2
    assert engine._loop.restarts == 0


def test_a_request_beyond_the_cache_is_refused_and_the_largest_one_is_not() -> None:
    limits = Limits(requests=2, step_tokens=8, cache_tokens=64)
    with Engine(models.llama(max_position_embeddings=512), limits=limits) as engine:
        with pytest.raises(reparam.Refused, match=r"together more than the 64 .* cache holds"):
            engine.answer([Request([3] * 60, None, 5)])
        assert len(engine.answer([Request([3] * 54, None, 10)])[0].ids) == 10
        assert engine._loop.restarts == 0


def test_more_open_requests_than_allowed_are_refused_and_a_long_list_is_not() -> None:
    limits = Limits(requests=2, step_tokens=64, cache_tokens=1024, open_requests=3)

    async def all_at_once(engine: Engine) -> list[Any]:
        async def one(text: list[int]) -> int:
            return len([token async for token in engine.generate(text, max_new_tokens=20)])

        return await asyncio.gather(*map(one, prompts(9, longest=20)), return_exceptions=True)

    with Engine(models.llama(), limits=limits) as engine:
        found = asyncio.run(all_at_once(engine))
        assert found[:3] == [20, 20, 20]
        assert all(isinstance(one, reparam.Busy) and "3 open requests" in str(one) for one in found[3:])
        assert len(engine.answer([Request(text, None, 3) for text in prompts(30, longest=20)])) == 30


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"requests": 0}, "requests=0"),
        ({"requests": True}, "requests=True"),
        ({"step_tokens": 32}, "step_tokens=32 is below requests=64"),
        ({"cache_tokens": 16}, "cache_tokens=16"),
    ],
)
def test_sizes_with_which_nothing_could_run_are_refused(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Limits(**limits)


def test_a_model_that_cannot_be_served_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="BertForSequenceClassification"):
        Engine(models.bert())
    adapted = models.llama()
    reparam.attach(adapted, reparam.LoRA(r=2))
    with pytest.raises(ValueError, match="has adapters on it"):
        Engine(adapted)
    with pytest.raises(reparam.FormatError, match="no adapter here"):
        Engine(models.llama(), adapters=tmp_path)
    with pytest.raises(reparam.FormatError, match="no such folder"):
        Engine(models.llama(), adapters=tmp_path / "none")


def test_a_release_of_transformers_without_a_needed_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    monkeypatch.delattr(PagedAttentionCache, "search_prefix_match")
    model = models.llama()
    with pytest.raises(reparam.ReparamError, match=r"has no PagedAttentionCache.search_prefix_match.*install trans"):
        Engine(model)
    assert model.config._attn_implementation == "sdpa"
    assert not model._forward_pre_hooks


def test_a_text_of_half_a_character_is_refused() -> None:
    tokenizer = AutoTokenizer.from_pretrained(models.ASSETS / "tiny-python")
    with (
        Engine(models.llama(vocab_size=4096), tokenizer, limits=SMALL) as engine,
        pytest.raises(reparam.Refused, match="the prompt holds half of a character"),
    ):
        engine.answer([Request("x = '\ud83d'", None, 2)])
