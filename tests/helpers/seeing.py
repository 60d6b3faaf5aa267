"""Tiny decoders that see, and batches of text with images for them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from models import TOKENS, VOCABULARY, build
from torch import Tensor
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from reparam import LoRA
from reparam.vision import Vision, VoRA

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
WINDOW = 4
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, SIZES),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, SIZES),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**SIZES, "head_dim": 8}),
    "mistral": (MistralForCausalLM, MistralConfig, {**SIZES, "sliding_window": WINDOW}),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            **SIZES,
            "head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
}
VISION = Vision(patch=2, size=8, width=12)
METHOD = LoRA(r=4, scaling="none")


def decoder(name: str = "llama", *, attention: str = "sdpa") -> Any:
    """A tiny random decoder with three blocks."""
    kind, config, sizes = MODELS[name]
    return build(kind, config(**{**TOKENS, **sizes, "attn_implementation": attention}))


def seeing(model: Any = None, **settings: Any) -> VoRA:
    """A model that sees, with two adapted blocks, at its start."""
    given = {"vision": VISION, "blocks": 2, "method": METHOD, **settings}
    return VoRA(decoder() if model is None else model, **given).eval()


@torch.no_grad()
def scrambled(vora: VoRA, seed: int = 3) -> VoRA:
    """The model with every trained parameter moved, so that adapter and images change the outputs."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in vora.trained().values():
        parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return vora


class Batch(NamedTuple):
    """Text with images: a row that is padded on the left and has two adjacent images, and a row with one."""

    ids: Tensor
    pixels: list[Tensor]
    images: Tensor
    valid: Tensor

    def inputs(self) -> dict[str, Any]:
        return {"pixel_values": self.pixels, "image_ids": self.images, "attention_mask": self.valid}


def batch() -> Batch:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (2, 20), generator=draw)
    images, valid = torch.full((2, 20), -1), torch.ones(2, 20, dtype=torch.long)
    valid[0, :3] = 0
    images[0, 5:9], images[0, 9:15], images[1, 2:8] = 0, 1, 2
    pixels = [torch.rand(3, *size, generator=draw) for size in ((4, 4), (4, 6), (6, 4))]
    return Batch(ids, pixels, images, valid)


TEACHER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 2,
}
FAMILIES: dict[str, tuple[Any, Any, int]] = {  # with the number of tokens before those of patches
    "clip": (CLIPVisionModel, CLIPVisionConfig, 1),
    "siglip": (SiglipVisionModel, SiglipVisionConfig, 0),
    "dinov2": (Dinov2Model, Dinov2Config, 1),
    "registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, 5),
    "aimv2": (Aimv2VisionModel, Aimv2VisionConfig, 0),
}


def vit(name: str = "siglip", **changes: Any) -> Any:
    kind, config, _ = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return kind(config(**{**TEACHER, **changes})).eval()
