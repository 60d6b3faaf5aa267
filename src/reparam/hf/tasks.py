"""Models for tasks: the class that transformers has for each, the labels in its configuration, and its new parts.

The files of most bases have no head for a task, and some lack the pooler below it. transformers initializes these
parts randomly; here the seed of the `Head` determines their values. They train whole, and are saved with the adapter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)

from reparam.core.text import counted
from reparam.data.batches import padding_id
from reparam.hf.folder import check_path, is_gguf
from reparam.hf.sound import check_config, from_files
from reparam.io.head import Head, Task
from reparam.sites.walk import newly_initialized

CLASSES: dict[str, Any] = {
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "embedding": AutoModel,
}
NAMES = {
    "causal": "causal language model",
    "seq2seq": "encoder-decoder model",
    "classification": "model for classification",
    "token-classification": "model for token classification",
    "embedding": "model for embeddings",
}
CLASSIFYING = ("classification", "token-classification")
_ENDS: dict[str, Task] = {
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token-classification",
    "ForConditionalGeneration": "seq2seq",
}


def name_of(head: Head | None) -> str:
    """What a model with this head is, in words."""
    return NAMES["causal" if head is None else head.task]


def task_of(config: PreTrainedConfig) -> Task | None:
    """The task that the architecture in a model's configuration is for; None for others, also causal ones."""
    names = [str(name) for name in getattr(config, "architectures", None) or ()]
    found = next((task for end, task in _ENDS.items() if any(name.endswith(end) for name in names)), None)
    return found if found != "seq2seq" or getattr(config, "is_encoder_decoder", False) else None


def config_of_base(path: str, *, revision: str | None = None) -> Any:
    """The configuration of a base model. Raises BaseError if it cannot be read, and for a GGUF file."""
    if is_gguf(path):
        with from_files(path, "model for a task"):
            raise ValueError("GGUF files hold causal language models; give the folder of the original model")
    cached = check_path(path)
    with from_files(path, "configuration"):
        config = AutoConfig.from_pretrained(
            path, revision=revision or "main", trust_remote_code=False, local_files_only=cached
        )
        check_config(config)
    return config


def own_head(path: str, *, revision: str | None = None) -> Head | None:
    """The head of a base whose architecture is one for a task, with the labels in its files; None for another base."""
    if is_gguf(path):
        return None
    config = config_of_base(path, revision=revision)
    task = task_of(config)
    if task is None or task == "causal":
        return None
    return Head(task, regression=task == "classification" and config.num_labels == 1)


def labels_of(config: Any) -> tuple[str, ...] | None:
    """The names of the classes that a base was trained for, in order; None if its architecture is no classifier."""
    names: dict[int, str] = dict(config.id2label or {})
    classifies = task_of(config) in CLASSIFYING and len(names) > 1
    return tuple(str(names[i]) for i in sorted(names)) if classifies else None


def set_head(config: Any, head: Head) -> None:
    """Write the labels into the configuration of a model."""
    if head.task in CLASSIFYING and (head.labels or head.regression):
        config.num_labels = head.outputs
        if head.labels:
            config.id2label = dict(enumerate(head.labels))
            config.label2id = {name: number for number, name in enumerate(head.labels)}
    if head.task == "classification":
        config.problem_type = "regression" if head.regression else "single_label_classification"


def check_fits(config: Any, head: Head | None) -> None:
    """Raise ValueError, with what to do, for a base whose architecture is for another task."""
    found = task_of(config)
    encodes = getattr(config, "is_encoder_decoder", False)
    if head is None and found is not None and type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"its architecture is {config.architectures[0]}; pass --task {found} to train it")
    if head is None and found in CLASSIFYING:
        raise ValueError(f"its architecture is {config.architectures[0]}; pass --task {found} to train it")
    if head is not None and head.task == "seq2seq" and not encodes:
        raise ValueError(f"a {config.model_type} is no encoder-decoder model; leave out --task for a causal one")
    if head is not None and type(config) not in CLASSES[head.task]._model_mapping:
        raise ValueError(f"transformers has no {name_of(head)} for {config.model_type}; choose another base or --task")


def head_parts(model: nn.Module) -> list[str]:
    """The names of the modules with parameters beside the base model, such as a classifier."""
    inner = getattr(model, "base_model_prefix", "")
    if not isinstance(getattr(model, inner or "-", None), nn.Module):
        return []
    return [name for name, child in model.named_children() if name != inner and any(True for _ in child.parameters())]


def trained_parts(model: nn.Module, head: Head | None) -> list[str]:
    """The modules that train whole for a task: the head of a classifier, and a pooler that the base's files lack."""
    if head is None or head.task not in CLASSIFYING:
        return []
    heads = head_parts(model)
    return [*heads, *(path for path in _poolers(newly_initialized(model)) if path not in heads)]


def _poolers(paths: Iterable[str]) -> list[str]:
    """The poolers that these modules are, or lie in."""
    parts = [path.split(".") for path in paths]
    return sorted({".".join(each[: each.index("pooler") + 1]) for each in parts if "pooler" in each})


def new_parts(model: nn.Module, head: Head | None, info: Mapping[str, Any]) -> list[str]:
    """The paths of modules that the base's files may lack: the head of a classifier, and a pooler.

    `info` is what transformers returns beside the model.
    """
    if head is None or head.task == "seq2seq":
        return []
    heads = head_parts(model) if head.task in CLASSIFYING else []
    return [*heads, *_poolers(info["missing_keys"])]


def without_new_pooler(model: Any, head: Head) -> None:
    """Remove a pooler that the files of an encoder for embeddings lack: embeddings are pooled from its tokens."""
    if head.task == "embedding" and "pooler" in _poolers(newly_initialized(model)):
        model.pooler = None


def known(info: Mapping[str, Any], parts: list[str]) -> dict[str, Any]:
    """What transformers says is missing or of another shape, without these modules."""
    starts = tuple(f"{part}." for part in parts)
    return {
        **info,
        "missing_keys": [name for name in info["missing_keys"] if not name.startswith(starts)],
        "mismatched_keys": [found for found in info["mismatched_keys"] if not found[0].startswith(starts)],
    }


@contextlib.contextmanager
def seeded(head: Head | None) -> Iterator[None]:
    """Draw the random values of new parts from the seed of the head, and leave the random state as it was."""
    if head is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(head.seed)
        yield


def pad_with(model: Any, tokenizer: Any) -> None:
    """Tell a model without a pad token the one that batches are padded with: decoders find the last token by it."""
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = padding_id(tokenizer)


def classes(head: Head) -> str:
    """The classes of a head, for tables and messages."""
    if head.regression:
        return "one number"
    shown = ", ".join(head.labels[:8]) + (", ..." if len(head.labels) > 8 else "")
    return f"{counted(len(head.labels), 'class', 'classes')}: {shown}" if head.labels else ""
