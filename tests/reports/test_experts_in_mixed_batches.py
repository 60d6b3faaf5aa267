"""Experts get some of the tokens in an order of their own: they are refused whatever they get; the rest works."""

from collections.abc import Callable
from typing import Any

import models
import pytest
from models import TOKENS, VOCABULARY, build
from selecting import adapted, ids_of, moved, rows_alone_or_refused
from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration, Qwen3MoeConfig, Qwen3MoeForCausalLM

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
@pytest.mark.parametrize("target", ["experts", "gate_up_proj", "experts.down_proj"])
def test_fused_experts_are_no_sites(make: Callable[[], Any], target: str) -> None:
    with pytest.raises(ValueError, match=r"is not supported; adapters support|matches no module"):
        moved(make(), "a", 1, targets=[target])
    with pytest.raises(ValueError, match=r"cannot be trained whole|matches no module|modules_to_save"):
        moved(make(), "a", 1, targets=["q_proj"], modules_to_save=[target])


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
