"""From what a user names on the command line to a model with an adapter on it."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from reparam.adapter import Adapter
from reparam.hf import load_base, load_tokenizer
from reparam.io import files
from reparam.io.record import FormatError
from reparam.load import load


def open_model(
    base: str | None, adapter: str | Path | None, *, dtype: str = "auto"
) -> tuple[nn.Module, PreTrainedTokenizerBase, Adapter | None]:
    """Base, tokenizer, and the adapter on it. A base that is not named is the one the adapter was trained on.

    Raises ValueError when neither tells the base.
    """
    folder = adapter_folder(adapter) if adapter is not None else None
    path = base or base_of(folder)
    model, tokenizer = load_base(path, dtype=dtype), load_tokenizer(path)
    if folder is None:
        return model, tokenizer, None
    return model, tokenizer, load(model, folder, name="adapter")


def adapter_folder(folder: str | Path) -> Path:
    """The adapter in `folder`, which may also be the folder of a training run."""
    path = Path(folder)
    return path / "adapter" if (path / "adapter" / "adapter.json").exists() else path


def base_of(folder: Path | None) -> str:
    """Where the base of an adapter is, as its files say. Raises ValueError when they do not."""
    record = files.read(folder) if folder is not None else None
    source = record.base.source if record is not None and record.base is not None else ""
    if not source:
        what = (
            f"{folder} does not say what its base is"
            if folder is not None
            else "neither a base nor an adapter is given"
        )
        raise FormatError(f"{what}; give --base with a folder or hub id")
    return source
