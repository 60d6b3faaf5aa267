"""Any model class of transformers, made tiny: its default configuration with every size lowered."""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
import re
from typing import Any

import torch
import transformers.models
from transformers import PreTrainedModel

SIZES = [  # the first expression that matches a setting's name gives its largest value
    (r"vocab_size$|vocabulary", 97),
    (r"num_(key_value|kv)_heads|num_attention_groups", 2),
    (r"heads?$|n_head", 4),
    (r"head_dim|d_kv", 8),
    (r"experts_per|top_?k|moe_k$", 2),
    (r"experts$|n_routed|n_shared|n_group|topk_group", 4),
    (r"layers?$|depth$|num_blocks", 2),
    (r"intermediate|ffn|d_ff|mlp_dim|inner_dim|d_inner|expert_dim", 48),
    (r"hidden_size|d_model|n_embd|embed_dim|^dim$|width|embedding_size|_dim$|_size_per", 32),
    (r"position|n_ctx|max_.*length|seq_len", 128),
    (r"image_size|input_size$", 32),
    (r"patch_size", 8),
    (r"_rank$", 8),
]
MOST = 30_000_000
"""Parameters that a model may still have; larger ones are left out."""


class TooLarge(Exception):  # noqa: N818  (not an error)
    """A model whose sizes could not be lowered."""


def tying_classes() -> list[type[PreTrainedModel]]:
    """All model classes of transformers that name tied weights."""
    found = []
    for package in pkgutil.iter_modules(transformers.models.__path__):
        folder = f"{transformers.models.__path__[0]}/{package.name}"
        for file in pkgutil.iter_modules([folder]):
            if not file.name.startswith("modeling_"):
                continue
            try:
                module = importlib.import_module(f"transformers.models.{package.name}.{file.name}")
            except ImportError:  # needs a package that is not installed
                continue
            found += [
                cls
                for cls in vars(module).values()
                if inspect.isclass(cls)
                and issubclass(cls, PreTrainedModel)
                and cls.__module__ == module.__name__
                and cls.config_class is not None
                and isinstance(cls._tied_weights_keys, dict)
                and cls._tied_weights_keys
            ]
    return found


def shrink(config: Any) -> Any:
    """Lower all sizes of a configuration in place, and let it tie what it can."""
    for name, value in list(vars(config).items()):
        if name.startswith("_") or isinstance(value, bool):
            continue
        if hasattr(value, "save_pretrained"):
            shrink(value)
        elif isinstance(value, int) and re.search(r"token_(id|index|idx)$", name):
            setattr(config, name, min(value, 90))
        elif isinstance(value, int):
            most = next((size for pattern, size in SIZES if re.search(pattern, name)), value)
            setattr(config, name, min(value, most))
    if isinstance(getattr(config, "eos_token_id", None), list):
        config.eos_token_id = 1
    if hasattr(config, "tie_word_embeddings"):
        config.tie_word_embeddings = True
    return config


def tiny(cls: type[PreTrainedModel]) -> Any:
    """A tiny model of this class with random weights, in eval mode. Raises what transformers does if it cannot be."""
    config = shrink(cls.config_class())  # type: ignore[misc]
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(copy.deepcopy(config)).parameters())
    if size > MOST:
        raise TooLarge(f"{cls.__name__}: {size:,} parameters")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(config).eval()
        scramble(model)
    return model


@torch.no_grad()
def scramble(model: PreTrainedModel) -> None:
    """Draw all trainable parameters at random; the others are tables that transformers computes."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.requires_grad:
            parameter.normal_(0, 0.1)
