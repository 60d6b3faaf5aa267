"""Open a base model, its tokenizer and, optionally, an adapter, as the command line names them."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from reparam.adapter.adapter import Adapter
from reparam.adapter.fitted import fitted
from reparam.adapter.load import place
from reparam.adapter.quantize import quantize
from reparam.adapter.tie import copies_together
from reparam.adapter.untie import untie
from reparam.core.base import Storage
from reparam.core.registry import find_storage
from reparam.data.framing import Frame, frame
from reparam.errors import FormatError
from reparam.hf import prompts
from reparam.hf.models import load_base
from reparam.hf.processors import words_of
from reparam.hf.tasks import pad_with
from reparam.io import files
from reparam.io.files import adapter_folder
from reparam.io.head import Head
from reparam.io.record import Packing, Record
from reparam.sites.walk import storages_in, tied, walk


def open_model(
    base: str | None,
    adapter: str | Path | None,
    *,
    dtype: str = "auto",
    storage: str | None = None,
    head: Head | None = None,
) -> tuple[nn.Module, PreTrainedTokenizerBase, Adapter | None]:
    """Load a base model and its tokenizer, and put an adapter, if one is given, on the model.

    Without `base`, the adapter's files name the base model. Matrices that were quantized when the adapter was trained
    are quantized in the same way here, unless `storage` ("dense", "nf4", "int8" or another registered name) sets the
    storage of all linear maps. Tied weights are untied if the adapter changes one of them, unless it was attached with
    `tie`. `head` is what the model is for, if no adapter is given; otherwise the adapter's files tell it. The tokenizer
    has the chat template that the adapter was trained with.

    Raises FormatError if neither `base` nor the adapter names the base model, or if the adapter's files are damaged or
    do not fit, and BaseError if the base model cannot be loaded.
    """
    folder = adapter_folder(adapter) if adapter is not None else None
    if folder is not None and prompts.prompting_of(folder) is not None:
        path = base or prompts.base_of(folder)
        if base is None:
            check_there(path, folder)
        found = prompts.load(_load(path, None, dtype, storage), folder, name="adapter")
        return found.model, prompted(words_of(path), found), found
    record = files.read(folder) if folder is not None else None
    path = base or base_of(record, folder)
    head = record.head if record is not None else head
    model, tokenizer = _load(path, record, dtype, storage, head), words_of(path)
    if head is not None:
        pad_with(model, tokenizer)
    if record is None or folder is None:
        return model, tokenizer, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `place` gives these warnings
        found_here = fitted(model, dict(walk(model)), record, folder)
    ties = copies_together(model, found_here.tensors, found_here.replaced)
    leaders = {*ties, *ties.values(), *(tie.to for tie in found_here.tied.values())}
    if tied(model, [path for path in (*found_here.replaced, *found_here.sites) if path not in leaders]):
        untie(model)  # the adapter can only have been trained on an untied base
    adapted = place(model, record, folder, name="adapter")
    return model, prompted(tokenizer, adapted), adapted


def prompted(tokenizer: PreTrainedTokenizerBase, adapter: Adapter) -> PreTrainedTokenizerBase:
    """The tokenizer with the chat template that the adapter was trained with; a copy if it is not the tokenizer's."""
    template = adapter.prompt_format.chat_template if adapter.prompt_format is not None else None
    if template is None:
        return tokenizer
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def frame_of(tokenizer: PreTrainedTokenizerBase, adapter: Adapter | None) -> Frame:
    """What was added to the chats that the adapter was trained on. Raises DataError if the template has changed."""
    told = adapter.prompt_format if adapter is not None else None
    if told is None:
        return Frame()
    return frame(tokenizer, system=told.system, thinking=told.thinking, key="the adapter's ")


def _load(path: str, record: Record | None, dtype: str, storage: str | None, head: Head | None = None) -> nn.Module:
    """The base model in the given storage, by default in the storages that the adapter was trained with."""
    if storage is not None and storage != "dense":
        return load_base(path, dtype=dtype, storage=find_storage(storage)(), head=head)
    told = record.base if record is not None and storage is None else None
    quantizing = told.packing if told is not None else ()
    first = quantizing[0] if quantizing else None
    if first is None:
        model = load_base(path, dtype=dtype, head=head)
        if storage == "dense" and storages_in(model):
            raise FormatError(
                f"{path}: its matrices are quantized, so the dense values are lost; pass the original model with --base"
            )
        return model
    model = load_base(path, dtype=dtype, storage=made(first), targets=first.modules, head=head)
    for other in quantizing[1:]:
        quantize(model, made(other), targets=other.modules)
    return model


def made(packing: Packing) -> Storage:
    """The storage with its settings. Raises FormatError for a storage or setting that this release does not know."""
    try:
        return find_storage(packing.storage)(**packing.settings)
    except (ValueError, TypeError) as error:
        raise FormatError(
            f"the adapter's base was quantized in a way that this release does not know: {error}"
        ) from None


def base_of(record: Record | None, folder: Path | None) -> str:
    """Folder or hub id of the base model, as the files of the adapter name it. Raises FormatError if they do not."""
    source = record.base.source if record is not None and record.base is not None else ""
    if not source:
        what = (
            f"{folder} does not name its base model"
            if folder is not None
            else "neither a base model nor an adapter is given"
        )
        raise FormatError(f"{what}; pass its folder or hub id with --base")
    check_there(source, folder)
    return source


def check_there(source: str, folder: Path | None) -> None:
    """Raise FormatError if the base that an adapter names is a folder or a GGUF file that does not exist."""
    if os.path.isabs(source) and not os.path.exists(source):
        raise FormatError(
            f"{folder}: was trained on the base {source}, which does not exist; pass its folder or hub id with --base"
        )
