"""Tiny models of transformers that compute with tokens first, [T, B, ...]."""

from typing import Any

from models import TOKENS, VOCABULARY, build
from transformers import FSMTConfig, FSMTForConditionalGeneration, XLNetConfig, XLNetLMHeadModel


def xlnet() -> Any:
    sizes = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
    return build(XLNetLMHeadModel, XLNetConfig(**TOKENS, **sizes, initializer_range=0.1))


def fsmt() -> Any:
    config = FSMTConfig(
        langs=["en", "de"], src_vocab_size=VOCABULARY, tgt_vocab_size=VOCABULARY, d_model=32, encoder_layers=2,
        decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
        init_std=0.1, max_position_embeddings=64, bos_token_id=0, pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return build(FSMTForConditionalGeneration, config)
