"""Tiny real transformers models with random weights, the same at every call, in eval mode.

Weights are larger than transformers draws them and biases are not zero, so that a difference anywhere reaches the
output. All of them have a vocabulary of 97 tokens; `IDS` is a batch for them.
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
    """A model whose numbers depend on nothing but its configuration."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, 0, 0.1)
    return model.eval()


def llama(**changes: Any) -> Any:
    """Grouped-query attention, an output head of its own, no biases but those asked for."""
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
    """The output head is the embedding's matrix."""
    return llama(tie_word_embeddings=True)


def gpt2(*, tied: bool = False) -> Any:
    """`Conv1D` with biases."""
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.1, tie_word_embeddings=tied, **TOKENS
    )
    return build(GPT2LMHeadModel, config)


def bert() -> Any:
    """An encoder with a pooler and a classifier."""
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
    """Encoder and decoder; both read one embedding called `shared`."""
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
    """Experts as fused 3-D parameters, and no linear map in the MLP."""
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
    """Fused experts beside a shared expert made of ordinary linear maps."""
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
    """The same with gradients; a decoder beside an encoder reads the same tokens."""
    if getattr(model.config, "is_encoder_decoder", False):
        return model(input_ids=ids, decoder_input_ids=ids).logits
    return model(input_ids=ids).logits


def loss(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    """Cross entropy of a causal language model on its own input."""
    return model(input_ids=ids, labels=ids).loss


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every tensor of a plain model."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal, names included, bit for bit."""
    return found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)


def save_base(folder: Path, **changes: Any) -> None:
    """A tiny random Llama with the embedded model's tokenizer beside it, as a folder that `reparam train` takes."""
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
