"""Write a dense model as GGUF: one file, `model.gguf`, with the tokenizer, which llama.cpp and transformers read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from reparam.core.progress import tracked
from reparam.errors import ExportError
from reparam.export.gguf_names import INSTEAD, Names
from reparam.export.gguf_tokenizer import add_tokenizer
from reparam.io.staged import staged_folder

FILE = "model.gguf"
TYPES = ("llama", "mistral", "qwen2", "qwen3")  # model types whose whole configuration is known to fit


def check_model(config: Any) -> None:
    """Raise ExportError if a model with this configuration cannot be written."""
    if config.model_type not in TYPES:
        raise ExportError(
            f"merged models of the type {config.model_type} are not supported for GGUF, only {', '.join(TYPES)}; "
            f"{INSTEAD}"
        )
    kind = config.rope_parameters.get("rope_type", "default")
    known = {"default", "linear"} | ({"llama3"} if config.model_type in ("llama", "mistral") else set())
    if kind not in known:
        raise ExportError(f"rotary embeddings of the type {kind} are not supported for GGUF; {INSTEAD}")
    if config.hidden_act not in ("silu", "swish"):
        raise ExportError(f"llama.cpp computes this architecture with SiLU, and this model has {config.hidden_act}")


@torch.no_grad()
def write(folder: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a model without adapters and without quantized weights; matrices keep their dtype, vectors are float32.

    Raises ExportError if GGUF cannot hold the model or its tokenizer.
    """
    import gguf

    config: Any = model.config
    check_model(config)
    names = Names(config)
    tied = config.tie_word_embeddings
    with staged_folder(folder, owned=True) as staging:
        writer = gguf.GGUFWriter(staging / FILE, names.architecture)
        writer.add_type(gguf.GGUFType.MODEL)
        _add_sizes(writer, config)
        writer.add_file_type(_file_type(model, gguf))
        add_tokenizer(writer, tokenizer, config.vocab_size)
        if config.rope_parameters.get("rope_type") == "llama3":
            writer.add_tensor("rope_freqs.weight", _frequency_factors(model, config).numpy())
        for key, tensor in tracked(model.state_dict().items(), "writing tensors", unit="tensors"):
            if tied and key == "lm_head.weight":
                continue
            path, _, end = key.rpartition(".")
            _add(writer, f"{names.of(path)}.{end}", names.rows(path, tensor), gguf)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _add_sizes(writer: Any, config: Any) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    longest = config.max_position_embeddings
    writer.add_context_length(min(longest, window) if window else longest)  # llama.cpp has no window here
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rotary = config.rope_parameters
    writer.add_rope_freq_base(float(rotary["rope_theta"]))
    if rotary.get("rope_type") == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rotary["factor"]))


def _frequency_factors(model: nn.Module, config: Any) -> Tensor:
    """By what llama.cpp divides the plain frequencies of the rotary embedding [head_dim / 2]."""
    found: Any = next(module.inv_freq for module in model.modules() if hasattr(module, "inv_freq"))
    found = found.double().cpu()
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(len(found), dtype=torch.float64) / len(found))
    return (plain / found).float()


def _file_type(model: nn.Module, gguf: Any) -> Any:
    kinds = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}
    return getattr(gguf.LlamaFileType, kinds[model.dtype])  # type: ignore[index]


def _add(writer: Any, name: str, tensor: Tensor, gguf: Any) -> None:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.ndim == 1 or tensor.dtype == torch.float32:
        writer.add_tensor(name, tensor.float().numpy())
    elif tensor.dtype == torch.bfloat16:
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, tensor.view(torch.uint8).numpy(), raw_shape=None, raw_dtype=kind)
    else:
        writer.add_tensor(name, tensor.numpy())
