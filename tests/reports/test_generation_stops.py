"""Generation stops where the model stops: at any of its end tokens, and at the token that ends a turn.

The model is a chain: each token is followed by one other, so that the answer is known in advance. After the answer it
ends the turn, and then says the answer again, for ever.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import chat_tokenizers as kit
import pytest
import torch
from command import reparam
from models import llama

from reparam.data.row import Row
from reparam.evaluation.score import answer
from reparam.hf.stops import stop_tokens

QUESTION = [{"role": "user", "content": "who"}]
EOS = kit.PAD  # the tokenizer's own end token, with which none of these models ends a turn


@torch.no_grad()
def chain(tokenizer: Any, text: str, end: str, template: str = kit.CHATML) -> Any:
    """A model that answers a chat with the text, then ends the turn and begins again."""
    tokenizer.chat_template = template
    size = len(tokenizer)
    model = llama(vocab_size=size, hidden_size=4 * (-(-size // 4)), num_hidden_layers=1, max_position_embeddings=256)
    layer = model.model.layers[0]
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()
    model.model.embed_tokens.weight.copy_(torch.eye(size, model.config.hidden_size))
    model.lm_head.weight.zero_()
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    ids = [prompt[-1], *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.convert_tokens_to_ids(end)]
    assert len(set(ids)) == len(ids)
    for now, following in zip(ids, [*ids[1:], ids[1]], strict=True):
        model.lm_head.weight[following, now] = 1.0
    return model


def given(model: Any, tokenizer: Any, text: str = "self") -> str:
    row = Row("chat", "f:1", messages=(*QUESTION, {"role": "assistant", "content": text}))
    (found,) = answer(model, tokenizer, [row], max_new_tokens=30)
    return found.given


def test_an_answer_is_not_longer_than_a_row_can_be() -> None:
    tokenizer = kit.make(end=EOS)
    row = Row("chat", "f:1", messages=(*QUESTION, {"role": "assistant", "content": "self " * 60}))
    model = chain(tokenizer, "self", "self", kit.CHATML)
    for longest, tokens in ((5, 5), (None, 60 * 5 + 8)):
        (found,) = answer(model, tokenizer, [row], longest=longest)
        assert len(tokenizer(found.given, add_special_tokens=False)["input_ids"]) == tokens


@pytest.mark.parametrize("template", [kit.CHATML, kit.MARKED, kit.UNMARKED, kit.LLAMA3, kit.STRIPS])
def test_the_token_that_ends_a_turn_in_the_template_ends_an_answer(template: str) -> None:
    tokenizer = kit.make(end=EOS)
    assert given(chain(tokenizer, "self", kit.END, template), tokenizer) == "self"


def test_the_last_answer_of_a_chat_may_end_with_another_token() -> None:
    tokenizer = kit.make(end=EOS)
    model = chain(tokenizer, "self", "<|system|>", kit.ENDS_LAST_OTHERWISE)
    assert given(model, tokenizer) == "self"
    assert tokenizer.convert_tokens_to_ids(kit.END) not in stop_tokens(model, tokenizer)


@pytest.mark.parametrize("told", [lambda end: end, lambda end: [0, end]])
def test_the_end_tokens_of_the_generation_config_end_an_answer(told: Any) -> None:
    tokenizer = kit.make(end=EOS)
    model = chain(tokenizer, "self", kit.BOS, kit.PLAIN)
    assert given(model, tokenizer).startswith("selfself")
    model.generation_config.eos_token_id = told(tokenizer.convert_tokens_to_ids(kit.BOS))
    assert given(model, tokenizer) == "self"


def test_an_end_token_that_is_no_special_token_is_cut_off() -> None:
    tokenizer = kit.make(end=EOS)
    tokenizer.add_tokens(["[done]"])
    model = chain(tokenizer, "self", "[done]", kit.CHATML.replace("<|end|>", "[done]"))
    assert given(model, tokenizer) == "self"


def test_rows_of_a_batch_end_where_each_ends() -> None:
    tokenizer = kit.make(end=EOS)
    model = chain(tokenizer, "self", kit.END)
    rows = [
        Row("chat", f"f:{i}", messages=({"role": "user", "content": "who " * i}, {"role": "assistant", "content": "a"}))
        for i in range(1, 5)
    ]
    assert [one.given for one in answer(model, tokenizer, rows, max_new_tokens=20)] == ["self"] * 4


def test_a_template_that_refuses_the_probe_adds_no_token() -> None:
    tokenizer = kit.make("{{ raise_exception('no') }}", end=EOS)
    model = llama()
    assert stop_tokens(model, tokenizer) == [tokenizer.eos_token_id]
    tokenizer.chat_template = None
    model.generation_config.eos_token_id = [5, 3]
    assert stop_tokens(model, tokenizer) == sorted({3, 5, tokenizer.eos_token_id})


def test_the_command_line_stops_there_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = kit.make(end=EOS)
    chain(tokenizer, "self", kit.END).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    assert reparam("generate", "who", "--base", tmp_path / "base", "--max-new-tokens", 30) == 0
    assert capsys.readouterr().out.strip() == "self"
    (tmp_path / "rows.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "who"}, {"role": "assistant", "content": "self"}]}\n'
    )
    assert reparam("eval", tmp_path / "rows.jsonl", "--base", tmp_path / "base", "--json") == 0
    assert '"exact match"' in (out := capsys.readouterr().out)
    assert '"value": 1.0' in out


@pytest.mark.parametrize(
    "more",
    [
        {"return_dict_in_generate": True},
        {"output_hidden_states": "abc"},
        {"output_scores": True, "output_logits": True},
    ],
    ids=str,
)
def test_settings_for_more_than_the_tokens(more: dict[str, Any], base: str, tmp_path: Path) -> None:
    """A generation_config.json can ask for more than the answers need, or for something that it cannot ask for."""
    folder = shutil.copytree(base, tmp_path / "base")
    call = ["generate", "def f(x):", "-b", folder, "--max-new-tokens", 2]
    assert reparam(*call) == 0
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **more}))
    assert reparam(*call) == 0
