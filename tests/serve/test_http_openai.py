"""The official `openai` client gets the answers that `generate` gives with the same adapter alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import http_server
import openai
import pytest
import torch
from http_server import Served
from openai import OpenAI

import reparam

Judge = Callable[..., list[int]]
CHAT = [{"role": "system", "content": "Write Python."}, {"role": "user", "content": "def area("}]


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with http_server.serving(folder, loading=True) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> OpenAI:
    return served.client()


@pytest.fixture(scope="module")
def judge(folder: Path) -> Judge:
    """What `generate` answers to a text or a chat with one adapter, greedily: ids."""
    model, tokenizer = http_server.load(folder), http_server.tokenizer(folder)
    for path in sorted((folder / "adapters").iterdir()):
        reparam.load(model, path, name=path.name)

    def answer(asked: Any, name: str | None, most: int, **settings: Any) -> list[int]:
        reparam.select(model, name)
        if isinstance(asked, str):
            ids = tokenizer(asked)["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        given = torch.tensor([ids])
        found = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=most,
            pad_token_id=0,
            **{"do_sample": False, **settings},
        )
        return found[0, len(ids) :].tolist()

    return answer


@pytest.fixture(scope="module")
def text_of(folder: Path) -> Callable[[list[int]], str]:
    """The text of ids, without the first bytes of a character that the next token would complete."""
    tokenizer = http_server.tokenizer(folder)
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize("name", [None, "a", "b", "dora"])
def test_chats_and_texts_equal_generate_whole_and_streamed(
    name: str | None, client: OpenAI, judge: Judge, text_of: Callable[[list[int]], str]
) -> None:
    settings: Any = {"model": name or "tiny", "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(messages=CHAT, **settings)
    expected = text_of(judge(CHAT, name, 12))
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].finish_reason == "length"
    chunks = list(
        client.chat.completions.create(messages=CHAT, stream=True, stream_options={"include_usage": True}, **settings)
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == expected
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].choices == []
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (whole.usage.prompt_tokens, 12)
    text = client.completions.create(prompt="def area(", **settings)
    assert text.choices[0].text == text_of(judge("def area(", name, 12))
    parts = list(client.completions.create(prompt="def area(", stream=True, **settings))
    assert "".join(part.choices[0].text for part in parts) == text.choices[0].text
    assert (whole.system_fingerprint is None) == (name is None)
    assert {c.system_fingerprint for c in chunks} == {whole.system_fingerprint}


def test_requests_over_all_models_at_once_equal_generate(
    client: OpenAI, judge: Judge, text_of: Callable[[list[int]], str]
) -> None:
    asked = [(f"def f{i % 3}(x", [None, "a", "b", "dora"][i % 4], 4 + i % 5) for i in range(24)]

    def ask(one: tuple[str, str | None, int]) -> str:
        prompt, name, most = one
        made = client.completions.create(model=name or "tiny", prompt=prompt, max_tokens=most, temperature=0)
        return made.choices[0].text

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, asked))
    assert found == [text_of(judge(*one)) for one in asked]


def test_several_prompts_and_choices_have_their_places(
    client: OpenAI, judge: Judge, text_of: Callable[[list[int]], str]
) -> None:
    made = client.completions.create(model="a", prompt=["def area(", "class A"], max_tokens=6, n=2, temperature=0)
    expected = [text_of(judge(prompt, "a", 6)) for prompt in ("def area(", "class A")]
    assert [choice.text for choice in made.choices] == [expected[0]] * 2 + [expected[1]] * 2
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    assert made.usage.completion_tokens == 24


def test_a_seed_gives_the_same_choices_again_whole_and_streamed_and_those_of_generate(
    client: OpenAI, judge: Judge, text_of: Callable[[list[int]], str]
) -> None:
    settings: Any = {"model": "b", "messages": CHAT, "max_tokens": 8, "n": 3, "seed": 7, "temperature": 0.9}
    whole = [c.message.content for c in client.chat.completions.create(**settings).choices]
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(stream=True, **settings):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert whole == streamed
    assert len(set(whole)) > 1
    for i, text in enumerate(whole):
        torch.manual_seed(7 + i)
        assert text == text_of(judge(CHAT, "b", 8, do_sample=True, temperature=0.9, top_k=0))


def test_stop_texts_cut_the_answer(client: OpenAI, judge: Judge, text_of: Callable[[list[int]], str]) -> None:
    expected = text_of(judge("def area(", "a", 20))
    stop = expected[8:11]
    cut = expected[: expected.index(stop)]
    settings: Any = {"model": "a", "prompt": "def area(", "max_tokens": 20, "temperature": 0, "stop": [stop, "never"]}
    whole = client.completions.create(**settings)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (cut, "stop")
    parts = list(client.completions.create(stream=True, **settings))
    assert "".join(part.choices[0].text for part in parts) == cut
    assert parts[-1].choices[0].finish_reason == "stop"


def test_log_probabilities_are_those_of_the_model(client: OpenAI, folder: Path) -> None:
    model, tokenizer = http_server.load(folder), http_server.tokenizer(folder)
    reparam.load(model, folder / "adapters" / "a")
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    settings: Any = {"messages": CHAT, "model": "a", "max_tokens": 4, "temperature": 0.5, "seed": 1}
    made = client.chat.completions.create(logprobs=True, top_logprobs=3, **settings)
    entries = made.choices[0].logprobs.content
    assert len(entries) == made.usage.completion_tokens
    for entry in entries:
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        best = scores.topk(3)
        assert [t.token for t in entry.top_logprobs] == [tokenizer.decode([i]) for i in best.indices.tolist()]
        assert [t.logprob for t in entry.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
        near = [i for i in range(len(scores)) if abs(float(scores[i]) - entry.logprob) < 1e-4]
        (token,) = [i for i in near if tokenizer.decode([i]) == entry.token]
        assert bytes(entry.bytes or b"").decode() in (entry.token, "")
        ids = [*ids, token]
    text = (
        client.completions.create(model="a", prompt="def area(", max_tokens=3, temperature=0, logprobs=2)
        .choices[0]
        .logprobs
    )
    assert [max(top, key=top.get) for top in text.top_logprobs] == text.tokens
    assert [top[token] for top, token in zip(text.top_logprobs, text.tokens, strict=True)] == text.token_logprobs
    assert text.text_offset == [0, len(text.tokens[0]), len(text.tokens[0] + text.tokens[1])]
    assert all(math.exp(logprob) <= 1 for logprob in text.token_logprobs)


def test_models_are_listed_with_their_base(client: OpenAI) -> None:
    found = {model.id: model for model in client.models.list().data}
    assert list(found) == ["tiny", "a", "b", "dora"]
    assert found["tiny"].parent is None
    assert found["a"].parent == "tiny"
    assert client.models.retrieve("a").id == "a"
    with pytest.raises(openai.NotFoundError, match="no model is named 'c'"):
        client.models.retrieve("c")


def test_an_unknown_model_is_404_and_never_the_base(client: OpenAI) -> None:
    for name in ("c", "A", "a ", "../a", "a/b", "sum-" + "0" * 64, "tiny+a", "a+c"):
        with pytest.raises(openai.NotFoundError) as raised:
            client.completions.create(model=name, prompt="x")
        assert raised.value.code == "model_not_found"
        assert raised.value.param == "model"


def test_a_sum_is_that_of_the_changes(client: OpenAI, folder: Path, text_of: Callable[[list[int]], str]) -> None:
    model, tokenizer = http_server.load(folder), http_server.tokenizer(folder)
    changes = {}
    for name in ("a", "b"):  # plain torch: the change of every weight, from merged copies
        other = http_server.load(folder)
        reparam.load(other, folder / "adapters" / name)
        reparam.merge(other)
        changes[name] = {key: p - model.state_dict()[key] for key, p in other.state_dict().items()}
    with torch.no_grad():
        for key, p in model.state_dict().items():
            p += changes["a"][key] - 0.5 * changes["b"][key]
    ids = torch.tensor([tokenizer("def area(")["input_ids"]])
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0
    )[0, ids.shape[1] :].tolist()
    settings: Any = {"prompt": "def area(", "max_tokens": 8, "temperature": 0}
    first = client.completions.create(model="a + -0.5*b", **settings)
    assert first.choices[0].text == text_of(expected)
    assert (
        client.completions.create(model="0.5*a+-0.5*b+0.5*a", **settings).system_fingerprint == first.system_fingerprint
    )
    alone = client.completions.create(model="1*a", **settings)
    assert alone.choices[0].text == client.completions.create(model="a", **settings).choices[0].text
    assert [model.id for model in client.models.list().data] == ["tiny", "a", "b", "dora"]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("a+dora", "its gain also scales"),
        ("a+", "expected names"),
        ("a*b", "expected names"),
        ("a+-1*a", "the weight of a is 0"),
        ("a+nan*b", "expected names"),
        ("1e9*a", "the weight of a is 1e"),
        ("+".join(f"a{i}" for i in range(9)), "at most 8"),
    ],
)
def test_a_sum_that_is_none_or_not_exact_is_refused_with_the_reason(model: str, said: str, client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as raised:
        client.completions.create(model=model, prompt="x")
    assert raised.value.param == "model"


def test_tools_reach_the_template_and_the_adapters_own_format_counts(folder: Path, tmp_path: Path) -> None:
    """An adapter whose files have a chat template and a system message is asked as it was trained."""
    from serving import save

    from reparam.io.prompt_format import FILE, PromptFormat

    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}"
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}=>{% endif %}"
    )
    save(http_server.load(folder), tmp_path / "own", seed=3)
    (tmp_path / "own" / FILE).write_bytes(PromptFormat("chat", template, "Be brief.").content())
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with http_server.serving(folder, root=tmp_path) as running:
        client = running.client()
        asked: Any = {"max_tokens": 8, "temperature": 0, "model": "own"}
        chats = [{"role": "user", "content": "hi"}]
        plain = client.chat.completions.create(messages=chats, **asked)
        text = client.completions.create(prompt="[system]Be brief.[user]hi=>", **asked)
        assert plain.choices[0].message.content == text.choices[0].text
        assert plain.usage.prompt_tokens == text.usage.prompt_tokens
        called = client.chat.completions.create(messages=chats, tools=tools, **asked)
        assert called.usage.prompt_tokens > plain.usage.prompt_tokens
        unused = client.chat.completions.create(messages=chats, tools=tools, tool_choice="none", **asked)
        assert unused.usage.prompt_tokens == plain.usage.prompt_tokens
        with pytest.raises(openai.BadRequestError, match="ignores them"):
            client.chat.completions.create(messages=chats, tools=tools, **{**asked, "model": "tiny"})


def test_request_ids_come_back(client: OpenAI) -> None:
    asked: Any = {"model": "a", "prompt": "x", "max_tokens": 1}
    given = client.completions.with_raw_response.create(extra_headers={"x-request-id": "my-1"}, **asked)
    assert given.headers["x-request-id"] == "my-1"
    odd = client.completions.with_raw_response.create(extra_headers={"x-request-id": "a b"}, **asked)
    assert odd.headers["x-request-id"].startswith("req-")


def test_metrics_count_by_model(client: OpenAI, served: Served) -> None:
    import urllib.request

    def read() -> dict[str, float]:
        text = urllib.request.urlopen(f"{served.url}/metrics").read().decode()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line[:1] != "#"}

    before = read()
    made = client.completions.create(model="dora", prompt="def area(", max_tokens=5, temperature=0)
    after = read()

    def more(key: str) -> float:
        return after[key] - before.get(key, 0)

    assert more('reparam_new_tokens_total{model="dora"}') == made.usage.completion_tokens
    assert more('reparam_prompt_tokens_total{model="dora"}') == made.usage.prompt_tokens
    assert more('reparam_requests_total{model="dora"}') == 1
    assert more('reparam_http_requests_total{path="/v1/completions",status="200"}') == 1
    assert more("reparam_step_seconds_count") >= 4
    assert after["reparam_ready"] == 1
