"""`resize_token_embeddings` with an adapter on the model: it works, or is refused before anything changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import IDS, llama, logits, t5
from selecting import change, under

import reparam

KNOWN = IDS.clamp(max=89)


@pytest.mark.parametrize("tokens", [90, 104])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", [reparam.LoRA(r=2), reparam.DoRA(r=2)], ids=["lora", "dora"])
def test_adapters_on_other_modules_stay(method: Any, tied: bool, tokens: int, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=tied)
    change(reparam.attach(model, method, name="a"), 1)
    before, mixed = under(model, "a", KNOWN), under(model, ["a", None, "a"], KNOWN)
    model.resize_token_embeddings(tokens)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert not any(p.requires_grad for p in model.get_input_embeddings().parameters())
    assert model.config.vocab_size == logits(model, KNOWN).shape[-1] == tokens
    for found, expected in ((under(model, "a", KNOWN), before), (under(model, ["a", None, "a"], KNOWN), mixed)):
        torch.testing.assert_close(found[..., :90], expected[..., :90], rtol=1e-4, atol=1e-4)
    reparam.adapters(model)["a"].save(tmp_path / "a")
    expected = under(model, "a", KNOWN)
    reparam.remove(model, "a")
    reparam.load(model, tmp_path / "a")
    torch.testing.assert_close(logits(model, KNOWN), expected, rtol=1e-4, atol=1e-4)
    assert "resize_token_embeddings" in vars(model)
    reparam.remove(model, "default")
    assert "resize_token_embeddings" not in vars(model)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "embedding": ({}, {"targets": ["embed_tokens"]}),
    "head": ({}, {"targets": ["q_proj", "lm_head"]}),
    "both, tied": ({"tie_word_embeddings": True}, {"targets": ["embed_tokens", "lm_head"], "tie": True}),
    "whole head": ({}, {"targets": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "whole embedding": ({}, {"targets": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
}


@pytest.mark.parametrize(  # the inner model has no head
    ("case", "inner"), [*((case, False) for case in CASES), ("embedding", True), ("whole embedding", True)]
)
def test_adapters_on_the_vocabulary_refuse_and_nothing_changes(case: str, inner: bool) -> None:
    changes, settings = CASES[case]
    model = llama(**changes)
    change(reparam.attach(model, reparam.LoRA(r=2), name="a", **settings), 1)
    before, own = logits(model), {name: id(p) for name, p in model.named_parameters()}
    called = model.model if inner else model
    for sizes in ({"new_num_tokens": 104}, {"new_num_tokens": 90}, {"pad_to_multiple_of": 64}):
        with pytest.raises(
            ValueError, match=r"(embed_tokens|lm_head) cannot get another number of rows, .* resize before"
        ):
            called.resize_token_embeddings(**sizes)
    assert {name: id(p) for name, p in model.named_parameters()} == own
    assert model.config.vocab_size == 97
    assert torch.equal(logits(model), before)
    assert called.resize_token_embeddings() is called.get_input_embeddings()
    assert called.resize_token_embeddings(97) is called.get_input_embeddings()
    reparam.merge(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    model.resize_token_embeddings(104)
    torch.testing.assert_close(logits(model)[..., :97], before, rtol=1e-4, atol=1e-4)


def test_a_copy_resizes_itself_and_an_encoder_decoder_refuses_too() -> None:
    model = t5()
    reparam.untie(model)
    plain = logits(model)
    change(reparam.attach(model, reparam.LoRA(r=2), targets=["q"], name="a"), 1)
    before = logits(model)
    twin = copy.deepcopy(model)
    twin.resize_token_embeddings(104)
    assert logits(twin).shape[-1] == 104
    assert torch.equal(logits(model), before)
    change(reparam.attach(model, reparam.LoRA(r=2), targets=["lm_head"], name="b"), 2)
    with pytest.raises(ValueError, match="lm_head cannot get another number of rows"):
        model.resize_token_embeddings(104)
    reparam.remove(model, "b")
    reparam.remove(model, "a")
    assert torch.equal(logits(model), plain)
