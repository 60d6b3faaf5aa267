"""Read the sizes and the input embedding of a base model from its files, without loading the model."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import cached_file

from reparam.data.unseen import untrained
from reparam.hf.folder import check_path, is_gguf
from reparam.hf.gguf import converted, tokenizer_folder_of
from reparam.hf.sound import check_config, from_files
from reparam.io.staged import inside

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")


class Sizes(NamedTuple):
    """Sizes of a base model."""

    vocabulary: int
    """Number of rows of the input embedding."""
    context: int | None
    """The context length that its configuration states (`max_position_embeddings`), in tokens."""
    embedding: str
    """Name of the input embedding's weight."""
    blocks: int | None = None
    """Number of its blocks (`num_hidden_layers`)."""


def sizes_of(path: str, *, revision: str | None = None) -> Sizes:
    """The sizes of the causal language model in a folder or on the hub; its weights are not read.

    Raises BaseError if there is none.
    """
    with from_files(path, "causal language model"):
        path = tokenizer_folder_of(path, revision=revision)  # has the configuration
    cached = check_path(path)
    with from_files(path, "causal language model"):
        config = AutoConfig.from_pretrained(
            path, revision=revision or "main", trust_remote_code=False, local_files_only=cached
        )
        check_config(config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        weight = model.get_input_embeddings().weight
        name = next(name for name, parameter in model.named_parameters() if parameter is weight)
        context = getattr(config, "max_position_embeddings", None)
        blocks = getattr(config.get_text_config(), "num_hidden_layers", None)
        return Sizes(int(weight.shape[0]), context if isinstance(context, int) else None, name, blocks)


def untrained_tokens(path: str, sizes: Sizes, known: int, *, revision: str | None = None) -> list[int] | None:
    """The ids of the tokens whose input embeddings look untrained, ascending; see `reparam.data.unseen`.

    `known` is the size of the tokenizer's vocabulary. Returns None if this cannot be told: the weights are not on this
    machine yet, or hold the embedding under another name or quantized. Raises BaseError if a file is damaged.
    """
    if is_gguf(path):
        place = converted(path)
        if place is None:
            return None
        path = place
    with from_files(path, "embedding"), _embedding(path, sizes, revision or "main") as matrix:
        if matrix is None:
            return None
        found = untrained(matrix, sizes.vocabulary, min(known, sizes.vocabulary))
    return [i for i in found.nonzero().flatten().tolist() if i < known]


@contextlib.contextmanager
def _embedding(path: str, sizes: Sizes, revision: str) -> Iterator[Any]:
    """The part of a file with the embedding, or None."""
    file = _file_with(path, sizes.embedding, revision)
    if file is None:
        yield None
        return
    with safe_open(file, framework="pt") as tensors:
        name = _name_in(list(tensors.keys()), sizes.embedding)
        part = tensors.get_slice(name) if name is not None else None
        yield part if part is not None and _fits(part, sizes.vocabulary) else None


def _fits(part: Any, rows: int) -> bool:
    """Whether the part of a file is a matrix of numbers with this number of rows, and not a quantized one."""
    shape = part.get_shape()
    return part.get_dtype() in FLOATS and len(shape) == 2 and shape[0] == rows and math.prod(shape) > 0


def _file_with(path: str, name: str, revision: str) -> Path | None:
    """The file that holds the tensor, if it is on this machine."""
    index = _local(path, INDEX, revision)
    if index is None:
        return _local(path, WEIGHTS, revision)
    files = json.loads(index.read_text())["weight_map"]
    found = _name_in(list(files), name)
    if found is None or not isinstance(files[found], str):
        return None
    return inside(path, files[found]) if Path(path).is_dir() else _local(path, files[found], revision)


def _local(path: str, name: str, revision: str) -> Path | None:
    if Path(path).is_dir():
        return Path(path, name) if Path(path, name).is_file() else None
    try:
        found = cached_file(path, name, revision=revision, local_files_only=True)
    except OSError:
        return None
    return None if found is None else Path(found)


def _name_in(names: list[str], name: str) -> str | None:
    """The name under which files hold the tensor: files of a model without its head leave out the first part."""
    end = ".".join(name.split(".")[-2:])
    near = [each for each in names if each == end or each.endswith(f".{end}")]
    return name if name in names else near[0] if len(near) == 1 else None
