"""Position embeddings in mixed batches: rows share their positions, and each row uses those of its own adapter.

The judge is each row alone under its adapter.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from models import TOKENS, VOCABULARY, build
from peft import PeftModel
from selecting import adapted, close, ids_of, rows_alone_or_refused
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BlenderbotConfig,
    BlenderbotForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import reparam

SHAPES = [(3, 3), (3, 5), (4, 1)]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}


def opt() -> Any:
    sizes = SIZES | {"ffn_dim": 24, "word_embed_proj_dim": 16, "init_std": 0.1}
    return build(OPTForCausalLM, OPTConfig(**TOKENS, **sizes, tie_word_embeddings=False))


def roberta() -> Any:
    config = RobertaConfig(**TOKENS | {"pad_token_id": 1}, **SIZES, intermediate_size=24, initializer_range=0.2)
    return build(RobertaForSequenceClassification, config)


def encoder_decoder(kind: Any, settings: Any) -> Any:
    config = settings(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=64, init_std=0.2,
        bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return build(kind, config)


def bart() -> Any:
    return encoder_decoder(BartForConditionalGeneration, BartConfig)


def blenderbot() -> Any:
    """Its positions get sizes and no tensor."""
    return encoder_decoder(BlenderbotForConditionalGeneration, BlenderbotConfig)


class Scaled(nn.Embedding):
    """An embedding with a forward of its own, as Gemma's."""

    def forward(self, ids: Tensor) -> Tensor:
        return 2 * super().forward(ids)


class Plain(nn.Module):
    """Positions [T] without a row dimension, and a map of them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, 8), Scaled(64, 8)
        self.of_places, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        places = self.of_places(self.places(torch.arange(ids.shape[1])))
        return self.head(torch.tanh(self.tokens(ids) + places))


def plain() -> Any:
    torch.manual_seed(0)
    return Plain().eval()


CASES: list[tuple[Callable[[], Any], list[str], list[str]]] = [
    (models.gpt2, ["wpe"], []),
    (models.gpt2, ["c_attn"], ["wpe"]),
    (models.bert, ["position_embeddings", "query"], []),
    (models.bert, ["query"], ["position_embeddings"]),
    (models.bert, ["token_type_embeddings"], []),
    (opt, ["q_proj"], ["embed_positions"]),
    (roberta, ["position_embeddings"], ["classifier"]),
    (plain, ["places", "head"], []),
    (plain, ["head"], ["places"]),
    (plain, ["of_places", "places"], []),
]


@pytest.mark.parametrize(("make", "targets", "whole"), CASES)
@pytest.mark.filterwarnings("ignore:LoRA. the rank exceeds")
def test_each_row_has_the_positions_of_its_adapter(
    make: Callable[[], Any], targets: list[str], whole: list[str]
) -> None:
    model = adapted(make(), targets=targets, modules_to_save=whole)
    for shape in SHAPES:
        assert rows_alone_or_refused(model, ids_of(*shape))


@pytest.mark.filterwarnings("ignore:LoRA. the rank exceeds")
def test_positions_that_the_caller_gives() -> None:
    """[B, T] and [1, T], in turn, also with as many rows as tokens."""
    model = adapted(models.gpt2(), targets=["wpe", "c_attn"])
    for rows, tokens in [(3, 3), (3, 5)]:
        places = torch.arange(tokens).flip(0).repeat(rows, 1) + torch.arange(rows)[:, None]
        assert rows_alone_or_refused(model, ids_of(rows, tokens), position_ids=places)
        assert rows_alone_or_refused(model, ids_of(rows, tokens))


@pytest.mark.parametrize(
    ("make", "targets", "whole"),
    [(models.gpt2, ["wpe"], []), (models.gpt2, ["c_attn"], ["wpe"]), (opt, ["q_proj"], ["embed_positions"]),
     (bart, ["q_proj"], ["encoder.embed_positions", "decoder.embed_positions"]),
     (blenderbot, ["q_proj"], ["encoder.embed_positions", "decoder.embed_positions"])],
)  # fmt: skip
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_with_a_cache(make: Callable[[], Any], targets: list[str], whole: list[str], beams: int) -> None:
    model = adapted(make(), targets=targets, modules_to_save=whole)
    ids, names = ids_of(3, 4), ["a", "b", None]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # padding to the left
    settings: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": beams, "do_sample": False}
    alone = []
    for row, name in enumerate(names):
        with reparam.select(model, name):
            alone.append(model.generate(ids[row, None], attention_mask=mask[row, None], **settings)[0])
    with reparam.select(model, names):
        found = model.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(found, torch.stack(alone))


@pytest.mark.filterwarnings("ignore:LoRA. the rank exceeds")
def test_what_does_not_broadcast_is_refused_with_the_reason() -> None:
    """T5's positions are distances [T, T], and their embeddings are biases of attention, not one vector for a token."""
    config = T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = adapted(build(T5ForConditionalGeneration, config), targets=["re:encoder.*relative_attention_bias"])
    for tokens in (3, 5):
        with reparam.select(model, ["a", "b", None]), pytest.raises(ValueError, match="rows share it, and the model"):
            model(input_ids=ids_of(3, tokens), decoder_input_ids=ids_of(3, 2))


def test_peft_reads_positions_that_train_whole(tmp_path: Path) -> None:
    model = adapted(opt(), targets=["q_proj"], modules_to_save=["embed_positions"])
    ids, names = ids_of(2, 5), ["a", "b"]
    with torch.no_grad(), reparam.select(model, names):
        found = model(ids).logits
    for row, name in enumerate(names):
        reparam.adapters(model)[name].save(tmp_path / name, format="peft")
        judge = PeftModel.from_pretrained(opt(), tmp_path / name)
        with torch.no_grad():
            assert close(found[row], judge(ids).logits[row])
