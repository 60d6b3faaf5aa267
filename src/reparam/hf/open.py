"""From what a user names on the command line to a model with an adapter on it."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from reparam.adapter.adapter import Adapter
from reparam.adapter.attach import untie
from reparam.adapter.load import place
from reparam.adapter.quantize import quantize
from reparam.core.base import Storage
from reparam.core.registry import find_storage
from reparam.errors import FormatError
from reparam.hf import prompts
from reparam.hf.models import load_base, load_tokenizer
from reparam.io import files
from reparam.io.files import adapter_folder
from reparam.io.record import Packing, Record
from reparam.sites.walk import storages_in, tied


def open_model(
    base: str | None, adapter: str | Path | None, *, dtype: str = "auto", storage: str | None = None
) -> tuple[nn.Module, PreTrainedTokenizerBase, Adapter | None]:
    """Base, tokenizer, and the adapter on it. A base that is not named is the one the adapter was trained on.

    Matrices that were quantized when the adapter was trained are quantized in the same way here, unless `storage` says
    how all linear maps are to be kept: "dense", "nf4", "int8". An embedding that the output head shares is untied for
    an adapter that changes one of them. Raises ValueError when neither tells the base.
    """
    folder = adapter_folder(adapter) if adapter is not None else None
    if folder is not None and prompts.prompting_of(folder) is not None:
        path = base or prompts.base_of(folder)
        found = prompts.load(_load(path, None, dtype, storage), folder, name="adapter")
        return found.model, load_tokenizer(path), found
    record = files.read(folder) if folder is not None else None
    path = base or base_of(record, folder)
    model, tokenizer = _load(path, record, dtype, storage), load_tokenizer(path)
    if record is None or folder is None:
        return model, tokenizer, None
    if tied(model, [*record.sites, *record.replaced]):
        untie(model)  # as the base was when it was trained, or it could not be there
    return model, tokenizer, place(model, record, folder, name="adapter")


def _load(path: str, record: Record | None, dtype: str, storage: str | None) -> nn.Module:
    """The base, in the storage that is asked for or, where none is, in those that the adapter was trained on."""
    if storage is not None and storage != "dense":
        return load_base(path, dtype=dtype, storage=find_storage(storage)())
    told = record.base if record is not None and storage is None else None
    quantizing = told.packing if told is not None else ()
    first = quantizing[0] if quantizing else None
    if first is None:
        model = load_base(path, dtype=dtype)
        if storage == "dense" and storages_in(model):
            raise FormatError(f"{path}: its matrices are quantized, and what they were before is lost; give --base")
        return model
    model = load_base(path, dtype=dtype, storage=made(first), targets=first.modules)
    for other in quantizing[1:]:
        quantize(model, made(other), targets=other.modules)
    return model


def made(packing: Packing) -> Storage:
    """The storage with its settings. Raises FormatError for one that this release does not have."""
    try:
        return find_storage(packing.storage)(**packing.settings)
    except (ValueError, TypeError) as error:
        raise FormatError(f"the adapter's base was quantized in a way that is not known here: {error}") from None


def base_of(record: Record | None, folder: Path | None) -> str:
    """Where the base of the adapter in `folder` is, as its files say. Raises ValueError when they do not."""
    source = record.base.source if record is not None and record.base is not None else ""
    if not source:
        what = (
            f"{folder} does not say what its base is"
            if folder is not None
            else "neither a base nor an adapter is given"
        )
        raise FormatError(f"{what}; give --base with a folder or hub id")
    return source
