"""Tiny transformers models with random weights, the same at every call, in eval mode.

Weights are larger than transformers' defaults and biases are not zero, so that every difference reaches the output. All
of them have a vocabulary of 97 tokens; `IDS` is a batch for them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

ASSETS = Path(__file__).parents[2] / "assets"
VOCABULARY = 97
IDS = torch.randint(2, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(7))
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}


def build(kind: type[PreTrainedModel], config: PreTrainedConfig) -> Any:
    """A model whose weights depend only on its configuration."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, 0, 0.1)
    return model.eval()


def llama(**changes: Any) -> Any:
    """A Llama: grouped-query attention, an untied output head, biases only on request."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
    }
    return build(LlamaForCausalLM, LlamaConfig(**{**TOKENS, **sizes, **changes}))


def tied_llama() -> Any:
    """A Llama whose output head is tied to the embedding."""
    return llama(tie_word_embeddings=True)


def gpt2(*, tied: bool = False) -> Any:
    """A GPT-2: `Conv1D` with biases."""
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.1, tie_word_embeddings=tied, **TOKENS
    )
    return build(GPT2LMHeadModel, config)


def bert() -> Any:
    """A BERT: an encoder with a pooler and a classifier."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.1,
        num_labels=3,
    )
    return build(BertForSequenceClassification, config)


def t5() -> Any:
    """A T5: encoder and decoder that share the embedding `shared`."""
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    return build(T5ForConditionalGeneration, config)


def mixtral() -> Any:
    """A Mixtral: experts as fused 3-D parameters, and no linear map in the MLP."""
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=False,
        **TOKENS,
    )
    return build(MixtralForCausalLM, config)


def qwen_moe() -> Any:
    """A Qwen MoE: fused experts and a shared expert of ordinary linear maps."""
    config = Qwen2MoeConfig(
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=False,
        **TOKENS,
    )
    return build(Qwen2MoeForCausalLM, config)


ALL: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "tied_llama": tied_llama,
    "gpt2": gpt2,
    "bert": bert,
    "t5": t5,
    "mixtral": mixtral,
    "qwen_moe": qwen_moe,
}


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    """The model's scores for a batch. Without gradients, because with them some attention kernels round differently."""
    return scores(model, ids)


def scores(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    """Logits with gradients; an encoder-decoder gets the same tokens on both sides."""
    if getattr(model.config, "is_encoder_decoder", False):
        return model(input_ids=ids, decoder_input_ids=ids).logits
    return model(input_ids=ids).logits


def loss(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    """Cross entropy of a causal language model on its own input."""
    return model(input_ids=ids, labels=ids).loss


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors of a plain model."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal, names included, bit for bit."""
    return found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)


def save_base(folder: Path, **changes: Any) -> None:
    """Save a tiny random Llama with the embedded model's tokenizer, for `reparam train`."""
    sizes = {
        "vocab_size": 4096,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "eos_token_id": 5,
        "pad_token_id": 1,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ASSETS / "tiny-python").save_pretrained(folder)
