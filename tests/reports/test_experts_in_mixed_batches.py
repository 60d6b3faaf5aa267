"""Experts get some of the tokens in an order of their own.

Stacked experts get the tokens of each adapter apart; experts of linear maps are refused; the rest works.
"""

from collections.abc import Callable
from typing import Any

import models
import moe
import pytest
import torch
from models import TOKENS, VOCABULARY, build
from selecting import adapted, change, ids_of, moved, rows_alone_or_refused
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import reparam

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPES = [(3, 5), (3, 3), (2, 2), (3, 1), (2, 4)]


def qwen3_moe() -> Any:
    """A Qwen3 MoE: fused experts, no shared expert."""
    config = Qwen3MoeConfig(
        **TOKENS, **SIZES, intermediate_size=48, moe_intermediate_size=16, head_dim=8, num_experts=4,
        num_experts_per_tok=2, max_position_embeddings=64, initializer_range=0.1, tie_word_embeddings=False,
    )  # fmt: skip
    return build(Qwen3MoeForCausalLM, config)


def nllb_moe() -> Any:
    """An NLLB MoE: experts of ordinary linear maps in every second layer."""
    config = NllbMoeConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_experts=4, expert_capacity=64,
        encoder_sparse_step=2, decoder_sparse_step=2, init_std=0.1, max_position_embeddings=64, bos_token_id=0,
        pad_token_id=1, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    return build(NllbMoeForConditionalGeneration, config)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("make", "targets", "whole"),
    [
        (models.mixtral, ["q_proj", "o_proj"], []),
        (models.mixtral, ["k_proj"], ["gate"]),
        (qwen3_moe, ["q_proj", "v_proj", "o_proj"], []),
        (models.qwen_moe, ["o_proj", "shared_expert.up_proj", "shared_expert_gate"], []),
        (models.qwen_moe, ["q_proj"], ["mlp"]),
    ],
)
def test_attention_routers_and_shared_experts(
    make: Callable[[], Any], targets: list[str], whole: list[str], shape: tuple[int, int]
) -> None:
    model = adapted(make(), targets=targets, modules_to_save=whole)
    assert rows_alone_or_refused(model, ids_of(*shape))


@pytest.mark.parametrize("make", [models.mixtral, models.qwen_moe, qwen3_moe])
@pytest.mark.parametrize("target", ["experts", "gate_up_proj", "1.mlp.experts.3.down_proj"])
def test_stacked_experts(make: Callable[[], Any], target: str) -> None:
    model = adapted(make(), targets=[target])
    for shape in SHAPES:
        assert rows_alone_or_refused(model, ids_of(*shape))


@pytest.mark.parametrize("method", [reparam.DoRA(r=2), reparam.Full()], ids=["dora", "full"])
def test_stacked_experts_with_other_methods_quantized_and_beside_the_base(method: Any) -> None:
    model = qwen3_moe()
    reparam.quantize(model, "nf4", targets="experts")
    for seed, name in enumerate("ab"):
        change(reparam.attach(model, method, name=name, targets=["experts", "q_proj"]), seed)
    assert rows_alone_or_refused(model, ids_of(3, 5))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_biases_and_other_implementations(implementation: str) -> None:
    model = adapted(moe.build("GptOss", implementation), targets=["experts"])
    assert rows_alone_or_refused(model, ids_of(3, 5))


def test_a_mixture_of_adapters_with_and_without_experts() -> None:
    model = qwen3_moe()
    moved(model, "a", 1, targets=["q_proj"])
    moved(model, "b", 2, targets=["experts"])
    assert rows_alone_or_refused(model, ids_of(4, 5))


def test_stacked_experts_in_a_packed_batch() -> None:
    model = adapted(qwen3_moe(), targets="all-linear")
    ids = ids_of(2, 6)
    names = ["a", "b"]
    alone = []
    for row, name in enumerate(names):
        with reparam.select(model, name):
            alone.append(models.logits(model, ids[row : row + 1, : 4 + row])[0])
    packed = torch.cat([ids[0, :4], ids[1, :5]])[None]
    positions = torch.cat([torch.arange(4), torch.arange(5)])[None]
    with reparam.select(model, names, spans="position_ids"), torch.no_grad():
        found = model(packed, position_ids=positions, use_cache=False).logits[0]
    assert torch.allclose(found, torch.cat(alone), atol=1e-5)


def test_experts_that_get_all_tokens() -> None:
    config = Llama4TextConfig(
        **TOKENS, **SIZES, intermediate_size=48, intermediate_size_mlp=48, head_dim=8, num_local_experts=4,
        max_position_embeddings=64, initializer_range=0.1, tie_word_embeddings=False,
    )  # fmt: skip
    model = adapted(build(Llama4ForCausalLM, config), targets=["experts"])
    assert rows_alone_or_refused(model, ids_of(3, 5))


@pytest.mark.parametrize("target", ["experts", "experts.3"])
def test_stacked_experts_cannot_be_trained_whole(target: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be trained whole|matches no module"):
        moved(models.mixtral(), "a", 1, targets=["q_proj"], modules_to_save=[target])


@pytest.mark.parametrize("expert", ["fc1", "expert_0.fc2"])
def test_experts_of_linear_maps_are_always_refused(expert: str) -> None:
    model = adapted(nllb_moe(), targets=[expert])
    for shape in SHAPES:
        for seed in range(3):
            more = {"decoder_input_ids": ids_of(*shape, seed=seed + 7)}
            assert not rows_alone_or_refused(model, ids_of(*shape, seed=seed), **more)


def test_attention_beside_experts_of_linear_maps() -> None:
    model = adapted(nllb_moe(), targets=["q_proj", "out_proj"])
    for shape in SHAPES:
        assert rows_alone_or_refused(model, ids_of(*shape), decoder_input_ids=ids_of(*shape, seed=7))
