"""Refuse to resize a vocabulary that adapters depend on, before transformers changes the model in part.

A model's `resize_token_embeddings` replaces the input embedding first and the output head after it. Updates and trained
copies of one of them have one row for each token, and would be lost or be left with the old number.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from reparam.sites.module import Adapted
from reparam.sites.replaced import Replaced
from reparam.sites.walk import walk
from reparam.sites.wrapped import bare

_NAME = "resize_token_embeddings"


def guard(model: nn.Module) -> None:
    """Check each call of `resize_token_embeddings` of the model and of the models in it, until `release`."""
    for module in model.modules():
        if hasattr(type(module), _NAME):
            module.__dict__[_NAME] = functools.partial(_resized, module)


def release(model: nn.Module) -> None:
    """Give the models their own method back."""
    for module in model.modules():
        vars(module).pop(_NAME, None)


def _resized(
    module: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
) -> nn.Embedding:
    """The model's `resize_token_embeddings`. Raises ValueError if an adapter or a storage is in the way."""
    paths = {part: path for path, part in walk(module)}
    for find in (module.get_input_embeddings, module.get_output_embeddings):
        part = find()
        held = None if part is None else bare(part)
        if isinstance(held, Adapted | Replaced) and _changes(held, new_num_tokens, pad_to_multiple_of):
            why = "an adapter is on it" if held.updates else "it is quantized"
            how = "merge or remove the adapter first, or resize before `attach`" if held.updates else "dequantize it"
            raise ValueError(
                f"{_NAME}: {paths.get(held, 'the embedding')} cannot get another number of rows, because {why}; {how}"
            )
    return type(module).resize_token_embeddings(module, new_num_tokens, pad_to_multiple_of, mean_resizing)


def _changes(held: nn.Module, tokens: int | None, multiple: int | None) -> bool:
    """Whether this number of tokens, rounded up to a multiple, differs from the rows that the module has."""
    rows = len(held.weight)  # type: ignore[arg-type]
    size = rows if tokens is None else tokens
    return (size if multiple is None else -(-size // multiple) * multiple) != rows
