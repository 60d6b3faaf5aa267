"""Embeddings whose forward does more than a lookup: Gemma's and BART's factor, positions with an offset."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters import assert_equal_but_for_rounding, trained
from models import IDS, build, frozen, logits, same
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    OPTConfig,
    OPTForCausalLM,
)

import reparam
from reparam.sites.targets import unsupported

TOKENS = {"vocab_size": 97, "pad_token_id": 5, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}


def gemma(**changes: Any) -> Any:
    config = Gemma3TextConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, initializer_range=0.1, **{**TOKENS, **changes},
    )  # fmt: skip
    return build(Gemma3ForCausalLM, config)


def bart() -> Any:
    config = BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, init_std=0.1, scale_embedding=True,
        decoder_start_token_id=2, **TOKENS,
    )  # fmt: skip
    return build(BartForConditionalGeneration, config)


def opt() -> Any:
    config = OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        init_std=0.1, word_embed_proj_dim=32, **TOKENS,
    )  # fmt: skip
    return build(OPTForCausalLM, config)


@pytest.mark.parametrize("make", [gemma, bart, opt])
def test_pefts_logits(make: Callable[[], Any], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(make(), peft.LoraConfig(target_modules=["embed_tokens", "q_proj"], r=3))
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn_like(parameter)
        model.eval().save_pretrained(str(tmp_path))
    found = make()
    before = logits(found)
    reparam.load(found, tmp_path)
    assert_equal_but_for_rounding(logits(found), logits(model))
    assert (logits(found) - before).abs().max() > 0.1
    reparam.select(found, None)
    assert torch.equal(logits(found), before)


@pytest.mark.parametrize("make", [gemma, bart])
def test_a_fresh_adapter_changes_no_bit(make: Callable[[], Any]) -> None:
    model = make()
    expected, tensors = logits(model), frozen(model)
    reparam.attach(model, "lora", r=2, targets=["embed_tokens"])
    assert torch.equal(logits(model), expected)
    assert same({k: t for k, t in model.state_dict().items() if k in tensors}, tensors)
    reparam.remove(model, "default")
    assert torch.equal(logits(model), expected)
    assert same(frozen(model), tensors)


def test_merging_gives_the_same_outputs(tmp_path: Path) -> None:
    model = gemma()
    adapter = trained(model, method=reparam.LoRA(r=2), targets=["embed_tokens"])
    adapter.save(tmp_path)
    expected = logits(model)
    plain, update = gemma(), adapter.updates["model.embed_tokens"]
    factors = update.factors(adapter.modules["model.embed_tokens"].frozen)
    with torch.no_grad():
        plain.model.embed_tokens.weight += factors.B @ factors.A
    assert_equal_but_for_rounding(logits(plain), expected)
    reparam.merge(model)
    assert_equal_but_for_rounding(logits(model), expected)


def test_rows_of_a_mixed_batch() -> None:
    model = gemma()
    found = {}
    for name in ("one", "two"):
        trained(model, method=reparam.LoRA(r=2), targets=["embed_tokens", "q_proj"], name=name)
        with torch.no_grad():
            for parameter in reparam.adapters(model)[name].parameters():
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(found)))
        reparam.select(model, name)
        found[name] = logits(model)
    names = ["two", "one"]
    ids = IDS[:2]
    reparam.select(model, names)
    mixed = logits(model, ids)
    for row, name in enumerate(names):
        assert_equal_but_for_rounding(mixed[row], found[name][row])
    assert (mixed[0] - found["one"][0]).abs().max() > 0.1


def test_copies_pickles_dtypes_and_quantized_matrices() -> None:
    model = gemma()
    trained(model, method=reparam.LoRA(r=2), targets=["embed_tokens"])
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    assert_equal_but_for_rounding(logits(copy.deepcopy(model).double()).float(), expected)
    plain = gemma()
    packed = gemma()
    reparam.quantize(packed, "int8", targets=["embed_tokens"])
    with torch.no_grad():
        plain.model.embed_tokens.weight.copy_(packed.model.embed_tokens.frozen.dense())
    assert_equal_but_for_rounding(logits(packed), logits(plain))
    trained(packed, method=reparam.LoRA(r=2), targets=["embed_tokens"])
    reparam.remove(packed, "default")
    assert_equal_but_for_rounding(logits(packed), logits(plain))


def test_the_padding_row_gets_no_gradient() -> None:
    model = gemma()
    adapter = reparam.attach(model, "full", targets=["embed_tokens"])
    ids = torch.tensor([[5, 7, 5, 9]])
    model(input_ids=ids).logits.square().sum().backward()
    (matrix,) = adapter.parameters()
    assert matrix.grad is not None
    assert matrix.grad[5].abs().max() == 0
    assert matrix.grad[7].abs().max() > 0


class Reversed(nn.Embedding):
    """Looks up the rows from the end."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(self.num_embeddings - 1 - input)


class Mixed(nn.Embedding):
    """Adds the mean over the tokens to each row."""

    def forward(self, input: Tensor) -> Tensor:
        found = super().forward(input)
        return found + found.mean(-2, keepdim=True) * torch.arange(found.shape[-2])[:, None]


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (lambda: opt().model.decoder.embed_positions, "computes the rows that it looks up, with an offset of 2"),
        (lambda: bart().model.encoder.embed_positions, "computes the rows that it looks up, with an offset of 2"),
        (lambda: Reversed(9, 3), "looks up other rows than its input names"),
        (lambda: Mixed(9, 3), "does more than change each of them"),
    ],
)
def test_other_lookups_are_refused(module: Callable[[], nn.Module], words: str) -> None:
    model = nn.Sequential(module())
    with pytest.raises(ValueError, match=words):
        reparam.attach(model, "lora", targets=["0"])
    assert "overrides nn.Embedding.forward" in unsupported(model, {"0": model[0]})["0"]
