"""Each row of a mixed batch is that row alone under its own adapter, in any order of a model, or refused."""

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from models import TOKENS, VOCABULARY, build
from sampled import FULL
from selecting import adapted, close, ids_of, rows_alone_or_refused
from time_first import fsmt, xlnet
from torch import Tensor, nn
from transformers import (
    OPTConfig,
    OPTForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

import reparam

SHAPES = [(2, 2), (3, 3), (3, 5), (4, 2), (3, 1)]


def opt() -> Any:
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OPTConfig(**TOKENS, **sizes, word_embed_proj_dim=32, max_position_embeddings=64, init_std=0.1)
    config.tie_word_embeddings = False
    return build(OPTForCausalLM, config)


def switch() -> Any:
    config = SwitchTransformersConfig(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
        num_experts=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0,
        expert_capacity=64,
    )  # fmt: skip
    return build(SwitchTransformersForConditionalGeneration, config)


class Chosen(nn.Module):
    """A layer whose tokens go to the expert that the layer chooses for them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.parts = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        self.head = nn.Linear(16, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        flat, chosen = x.flatten(0, 1), (ids % len(self.parts)).flatten()
        out = torch.zeros_like(flat)
        for number, part in enumerate(self.parts):
            here = (chosen == number).nonzero().squeeze(1)
            if len(here):
                out[here] = part(flat[here])
        return self.head(out.view_as(x))


class TimeFirst(nn.Module):
    """An nn.Transformer's encoder in the default order, [T, B, H]."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.inside = inside
        self.into = nn.Linear(16, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0), 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.inside:
            return self.encoder(self.into(x).transpose(0, 1)).transpose(0, 1)
        return self.encoder(self.into(x))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", [xlnet, fsmt, opt, models.llama, models.gpt2, models.bert, models.qwen_moe])
@pytest.mark.filterwarnings("ignore:targets. skipped")
def test_every_order_is_found(make: Callable[[], Any], shape: tuple[int, int]) -> None:
    model = adapted(make())
    more = {"decoder_input_ids": ids_of(*shape, seed=5)} if make is fsmt else {}
    for seed in range(3):
        assert rows_alone_or_refused(model, ids_of(*shape, seed=seed), **more)


@pytest.mark.parametrize("make", [xlnet, fsmt])
def test_an_order_that_was_found_serves_other_sizes(make: Callable[[], Any]) -> None:
    model = adapted(make())
    for shape in [(3, 5), (3, 3), (5, 3), (2, 2), (2, 1)]:
        more = {"decoder_input_ids": ids_of(shape[0], 3, seed=5)} if make is fsmt else {}
        assert rows_alone_or_refused(model, ids_of(*shape), **more)


@pytest.mark.filterwarnings("ignore:targets. skipped", "ignore:LoRA. the rank")
def test_experts_are_refused_whatever_they_get() -> None:
    model = adapted(Chosen().eval(), targets=["parts.0", "parts.1", "parts.2", "head"])
    for seed in range(60):
        assert not rows_alone_or_refused(model, ids_of(3, 3, seed=seed))
    with reparam.select(model, ["a"] * 3):
        mixed = model(ids_of(3, 3))
    with reparam.select(model, "a"):
        assert close(mixed, model(ids_of(3, 3)))


@pytest.mark.parametrize("targets", [["wi", "wo"], ["q", "v"]])
def test_experts_of_switch_transformers(targets: list[str]) -> None:
    model = adapted(switch(), targets=targets)
    for seed in range(12):
        found = rows_alone_or_refused(model, ids_of(2, 3, seed=seed), decoder_input_ids=ids_of(2, 2, seed=seed))
        assert found == (targets == ["q", "v"])


@pytest.mark.parametrize("targets", [["into"], ["linear1", "linear2"]])
def test_a_transformer_that_gets_tokens_first(targets: list[str]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 3, 16)
    inside, outside = (adapted(TimeFirst(inside).eval(), targets=targets) for inside in (True, False))
    assert rows_alone_or_refused(inside, x)
    with reparam.select(outside, ["a", "b", None]), pytest.raises(ValueError, match="depend on the others"):
        outside(x)


WHOLE: list[tuple[Callable[[], Any], str]] = [
    (opt, "final_layer_norm"),  # rows and tokens in one dimension; weight and bias
    (opt, "self_attn_layer_norm"),
    (opt, "fc1"),
    (opt, "lm_head"),
    (opt, "embed_tokens"),
    (models.llama, "norm"),  # an RMSNorm
    (models.llama, "mlp"),
    (models.gpt2, "ln_f"),
    (models.gpt2, "c_fc"),  # a Conv1D
    (models.bert, "classifier"),
    (models.bert, "pooler"),
    (models.bert, "LayerNorm"),
    (models.qwen_moe, "gate"),  # its output is a tuple
    (models.qwen_moe, "shared_expert"),
]


@pytest.mark.parametrize(("make", "whole"), WHOLE)
def test_modules_that_train_whole_use_the_same_rule(make: Callable[[], Any], whole: str) -> None:
    """With as many rows as tokens, and with another number, in turn; the full suite tries all shapes."""
    targets = {models.gpt2: "c_attn", models.bert: "query"}.get(make, "q_proj")
    turn = WHOLE.index((make, whole))
    for shape in SHAPES if FULL else (SHAPES[turn % 2], SHAPES[2 + turn % 3]):
        model = adapted(make(), targets=[targets], modules_to_save=[whole])
        assert rows_alone_or_refused(model, ids_of(*shape))


@pytest.mark.parametrize("whole", ["layer_1", "k_proj"])
def test_modules_that_train_whole_in_models_with_tokens_first(whole: str) -> None:
    make = xlnet if whole == "layer_1" else fsmt
    model = adapted(make(), targets=["layer_2" if make is xlnet else "fc1"], modules_to_save=[whole])
    more = {"decoder_input_ids": ids_of(3, 3, seed=5)} if make is fsmt else {}
    assert rows_alone_or_refused(model, ids_of(3, 3), **more)


def test_a_refused_batch_is_refused_again() -> None:
    model = adapted(TimeFirst(False).eval(), targets=["into"])
    x = torch.randn(3, 3, 16, generator=torch.Generator().manual_seed(0))
    with reparam.select(model, ["a", "b", None]):
        for _ in range(2):
            with pytest.raises(ValueError, match="depend on the others"):
                model(x)
        with pytest.raises(ValueError, match="3 adapter names, one per row"):
            model(x[:2])
