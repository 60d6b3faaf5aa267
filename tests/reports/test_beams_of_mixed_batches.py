"""Beams and several sequences for each row: names are given for each row of the input."""

import copy
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from models import IDS, VOCABULARY, build
from selecting import moved
from time_first import fsmt, xlnet
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import reparam

NAMES = ["a", None, "b"]


def bart() -> Any:
    config = BartConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, init_std=0.2,
        forced_eos_token_id=None,
    )  # fmt: skip
    return build(BartForConditionalGeneration, config)


def whisper() -> Any:
    config = WhisperConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=20,
        max_target_positions=24, num_mel_bins=8, decoder_start_token_id=1, bos_token_id=1, pad_token_id=0,
        eos_token_id=2, init_std=0.2, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = build(WhisperForConditionalGeneration, config)
    model.generation_config.no_timestamps_token_id = VOCABULARY - 1
    return model


def two(make: Callable[[], Any]) -> Any:
    model = make()
    moved(model, "a", 1)
    moved(model, "b", 2, r=3)
    return model


@pytest.mark.parametrize("make", [models.llama, models.t5, bart, whisper, fsmt])
@pytest.mark.parametrize("more", [{"num_beams": 2}, {"num_beams": 4, "num_return_sequences": 2}])
def test_names_are_those_of_the_input(make: Callable[[], Any], more: dict[str, int]) -> None:
    model = two(make)
    inputs = torch.randn(3, 8, 40, generator=torch.Generator().manual_seed(0)) if make is whisper else IDS
    settings = {"max_new_tokens": 4, "do_sample": False, **more}
    with reparam.select(model, NAMES):
        found = model.generate(inputs, **settings)
    count = more.get("num_return_sequences", 1)
    for row, name in enumerate(NAMES):
        with reparam.select(model, name):
            alone = model.generate(inputs, **settings)
        size = min(alone.shape[1], found.shape[1])
        rows = slice(row * count, (row + 1) * count)
        assert torch.equal(found[rows, :size], alone[rows, :size])


@pytest.mark.parametrize("make", [models.llama, models.t5, bart, whisper, fsmt, xlnet])
@pytest.mark.parametrize("size", [2, 3])
def test_as_many_rows_as_tokens_and_beams(make: Callable[[], Any], size: int) -> None:
    """Nothing but what the sizes belong to tells rows, tokens and beams apart."""
    model, names = two(make), NAMES[:size]
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(3, VOCABULARY, (size, size), generator=generator)
    if make is whisper:
        inputs = torch.randn(size, 8, 40, generator=generator)
    settings = {"max_new_tokens": size, "do_sample": False, "num_beams": size, "num_return_sequences": size}
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    with reparam.select(model, names):
        found = model.generate(inputs, **settings)
    for row, name in enumerate(names):
        with reparam.select(model, name):
            alone = model.generate(inputs, **settings)
        rows = slice(row * size, (row + 1) * size)
        torch.testing.assert_close(found.sequences_scores[rows], alone.sequences_scores[rows], rtol=1e-4, atol=1e-5)
        length = min(found.sequences.shape[1], alone.sequences.shape[1])
        assert torch.equal(found.sequences[rows, :length], alone.sequences[rows, :length])


def test_outside_of_generation_the_number_of_rows_must_be_that_of_names() -> None:
    model = two(models.t5)
    with reparam.select(model, NAMES):
        model.generate(input_ids=IDS, num_beams=2, max_new_tokens=2)
        twice = IDS.repeat_interleave(2, 0)
        with pytest.raises(ValueError, match="3 adapter names, one per row"):
            model(input_ids=twice, decoder_input_ids=twice)
        with pytest.raises(ValueError, match="3 adapter names, one per row"):
            model.generate(input_ids=twice, max_new_tokens=2)
    assert "generate" not in vars(model)


def test_a_copy_of_a_model_generates_for_itself() -> None:
    model = two(models.llama)
    with reparam.select(model, NAMES):
        twin = copy.deepcopy(model)
        before = twin.generate(IDS, max_new_tokens=3, do_sample=False)
        with torch.no_grad():
            model.lm_head.weight.zero_()
        assert torch.equal(twin.generate(IDS, max_new_tokens=3, do_sample=False), before)
