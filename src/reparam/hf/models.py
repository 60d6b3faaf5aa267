"""Models and tokenizers of transformers: loading with clear refusals, and writing plain or quantized models safely."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from reparam.core.base import Storage
from reparam.core.checks import nearest
from reparam.errors import BaseError
from reparam.hf import quantizer as hf_quantizer  # noqa: F401  (registers itself, so that quantized folders can be read)
from reparam.hf.config import (
    METHOD,
    StorageConfig,
    config_for,
    config_of,
    file_tensors,
    from_bitsandbytes,
    to_bitsandbytes,
)
from reparam.io.staged import staged_folder
from reparam.sites import targets as targets_
from reparam.sites.walk import storages_in


def load_base(
    path: str,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    storage: Storage | None = None,
    targets: targets_.Targets = "all-linear",
) -> nn.Module:
    """The causal language model in a local folder or on the hub, in eval mode.

    With a `storage`, the matrices that `targets` names are quantized while they are read, as `reparam.quantize` would
    do it afterwards. A folder that is quantized already, by `save_model` or in NF4 by bitsandbytes (which is not needed
    for it), is read as it is, without quantizing anything anew.

    Weights are read from safetensors only, and no code of the repository is run. Raises BaseError, in one sentence,
    for a folder that does not exist or holds no such model, for one that is quantized in another way than is asked for,
    and for a hub that cannot be reached.
    """
    _check_path(path)
    logging.disable_progress_bar()
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        config = AutoConfig.from_pretrained(path, revision=revision or "main", trust_remote_code=False)
        quantized = _storage_config(config)
        if quantized is not None:
            config.quantization_config = quantized.to_dict()
            _check_storage(quantized, storage)
        quantizing = None if quantized is not None or storage is None else config_for(storage, targets)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=wanted,
            revision=revision or "main",
            use_safetensors=True,
            trust_remote_code=False,
            **({} if quantizing is None else {"quantization_config": quantizing}),
        )
        if quantized is not None and storage is not None:
            dense = sorted(set(targets_.resolve(model, targets)) - storages_in(model).keys())
            if dense:
                raise ValueError(f"is quantized already, without {', '.join(dense[:3])}; load the original model")
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise BaseError(f"{path}: no causal language model could be loaded: {_first_line(error)}") from error
    return model.eval()


def load_tokenizer(path: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model. Raises BaseError."""
    _check_path(path)
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise BaseError(f"{path}: no tokenizer could be loaded: {_first_line(error)}") from error


def save_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, folder: str | Path, *, format: str = "reparam"
) -> None:
    """Write a plain or quantized model, and its tokenizer, into a new folder; whole, or not at all.

    A quantized one is written as it is. `format` says who is to read it: "reparam" (`load_base`, or transformers once
    `reparam.hf.models` is imported), or "bitsandbytes" (transformers with bitsandbytes; `load_base` too).

    Raises ValueError while adapters are on the model (stock tools could not read it), for the folder that the base
    came from, which would be overwritten, and for a quantized model that the format has no place for.
    """
    target = Path(folder).resolve()
    tensors = file_tensors(model)
    check_not_base(target, str(model.config._name_or_path))  # type: ignore[union-attr]
    entry = _entry(model, format)
    with staged_folder(target) as staging:
        model.save_pretrained(staging, state_dict=tensors)  # type: ignore[operator]
        if entry is not None:
            file = staging / "config.json"
            config = {**json.loads(file.read_text()), "quantization_config": entry}
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)


def check_not_base(folder: str | Path, base: str) -> None:
    """Raise ValueError when `folder` is where the base model is, or lies around or inside it."""
    target, source = Path(folder).resolve(), Path(base).resolve()
    if base and source.exists() and (target == source or source in target.parents or target in source.parents):
        raise ValueError(f"{folder}: is the folder of the base model {base}, or holds it; choose another")


def vocabulary(model: nn.Module) -> int:
    """Number of rows of the input embedding."""
    module = model.get_input_embeddings()  # type: ignore[operator]
    return int(module.weight.shape[0])


def _storage_config(config: Any) -> StorageConfig | None:
    """What a folder's configuration says of how it is quantized, in our terms; None where it is dense, or not ours."""
    values = getattr(config, "quantization_config", None)
    if not isinstance(values, dict):
        return None
    if values.get("quant_method") == METHOD:
        return StorageConfig.from_dict(values)
    return from_bitsandbytes(values) if values.get("quant_method") == "bitsandbytes" else None


def _check_storage(quantized: StorageConfig, storage: Storage | None) -> None:
    if storage is not None and storage != quantized.storage:
        raise ValueError(
            f"is quantized already, as {quantized.storage}, and {storage} was asked for: quantizing twice loses twice; "
            f"load the original model, or leave the storage out"
        )


def _entry(model: nn.Module, format: str) -> dict[str, Any] | None:
    """The entry of a quantized model in `config.json`."""
    if format not in ("reparam", "bitsandbytes"):
        raise ValueError(f"format={format!r}: expected 'reparam' or 'bitsandbytes'")
    if format == "bitsandbytes":
        return to_bitsandbytes(model)
    return config_of(model).to_dict() if storages_in(model) else None


def _check_path(path: str) -> None:
    if not path:
        raise BaseError("no base model was given: set base.path to a folder or a hub id")
    local = Path(path)
    if local.is_dir():
        if not (local / "config.json").exists():
            raise BaseError(f"{path}: is a folder without config.json, so it holds no model{_adapter_hint(local)}")
    elif local.exists():
        raise BaseError(f"{path}: is a file; give the model's folder or a hub id")
    elif path.startswith((".", "/", "~")) or path.count("/") > 1:
        near = [p.name for p in local.parent.iterdir()] if local.parent.is_dir() else []
        raise BaseError(f"{path}: no such folder{nearest(local.name, near)}")


def _adapter_hint(folder: Path) -> str:
    held = [name for name in ("adapter.json", "adapter_config.json") if (folder / name).exists()]
    return f" ({held[0]} says that it is an adapter: give it as the adapter, and its base as the base)" if held else ""


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]
