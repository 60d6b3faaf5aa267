"""Tiny Mixture-of-Experts models of transformers whose experts are stacked."""

from __future__ import annotations

from typing import Any

import models
import torch
import transformers

import reparam

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
         "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.1,
         "tie_word_embeddings": False}  # fmt: skip
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
       "head_dim": 4}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},  # its files have experts of their own, with other names
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},  # gate_up_proj is square
    "DeepseekV3": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 2,
                   "topk_group": 1, "first_k_dense_replace": 1, **MLA},  # and shared experts, and a dense layer
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2},  # transposed, interleaved, with biases
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Llama4": {"num_local_experts": 4, "intermediate_size_mlp": 48},  # transposed, all tokens for each expert
}  # fmt: skip


def build(kind: str, implementation: str = "grouped_mm", **changes: Any) -> Any:
    """A model of this kind."""
    config = getattr(transformers, f"{kind}{'Text' if kind == 'Llama4' else ''}Config")
    model = getattr(transformers, f"{kind}ForCausalLM")
    found = models.build(model, config(**{**models.TOKENS, **SIZES, **KINDS[kind], **changes}))
    if kind != "Llama4":
        found.set_experts_implementation(implementation)
    return found


@torch.no_grad()
def trained(adapter: reparam.Adapter) -> reparam.Adapter:
    """The adapter with parameters as after training, none of them zero."""
    draw = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        parameter += torch.randn(parameter.shape, generator=draw) * 0.2
    return adapter
