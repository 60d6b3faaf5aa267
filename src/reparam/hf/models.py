"""Load models and tokenizers with transformers, with clear errors, and save dense or quantized models atomically."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from reparam.core.base import Storage
from reparam.core.progress import waiting
from reparam.hf import quantizer as hf_quantizer
from reparam.hf.bars import waits_of_transformers
from reparam.hf.config import (
    METHOD,
    StorageConfig,
    check_without_adapters,
    config_for,
    config_of,
    from_bitsandbytes,
    to_bitsandbytes,
)
from reparam.hf.digest import order_metadata
from reparam.hf.folder import check_path
from reparam.hf.gguf import folder_of, tokenizer_folder_of
from reparam.hf.sound import check_complete, check_config, check_dense, check_finite, from_files, report_held
from reparam.hf.tasks import CLASSES, check_fits, known, name_of, new_parts, seeded, set_head, without_new_pooler
from reparam.io.head import Head
from reparam.io.staged import staged_folder
from reparam.sites import targets as targets_
from reparam.sites.walk import storages_in
from reparam.weights.layouts import QUANTIZED

DTYPES = ("float32", "bfloat16", "float16", "float64")


def load_base(
    path: str,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    storage: Storage | None = None,
    targets: targets_.Targets = "all-linear",
    head: Head | None = None,
) -> nn.Module:
    """Load a causal language model from a local folder, a GGUF file or the hub, in eval mode.

    With a `head`, load a model for its task instead, with its labels. A head or pooler that the files lack, or hold for
    another number of classes, gets random values from the seed of `head`.

    `dtype` is "auto" (as in the files) or one of `DTYPES`. With a `storage`, the matrices that `targets`
    selects are quantized while they are read; the result equals that of `reparam.quantize` after loading. A model that
    is already quantized, by `save_model` or in NF4 by bitsandbytes, is read as it is; bitsandbytes is not needed. The
    weights of a GGUF file are dequantized (`reparam.hf.gguf`).

    Weights are read from safetensors only, and code in the repository is never run. Raises BaseError if the folder does
    not exist or holds no causal language model, if its files are damaged, lack a parameter of the model or hold NaN or
    infinity, if the model is already quantized in another way than `storage` and `targets` ask for, and if the hub
    cannot be reached; ValueError for another `dtype`.
    """
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype={dtype!r}: expected one of auto, {', '.join(DTYPES)}")
    disable_progress_bar()
    what = name_of(head)
    with from_files(path, what):
        folder = folder_of(path, dtype=dtype, revision=revision)
    cached = check_path(folder)
    place = os.path.abspath(folder) if os.path.isdir(folder) else folder
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    loading = waiting(f"loading {path}")
    with from_files(path, what), report_held() as reports, loading, waits_of_transformers(), seeded(head):
        config = AutoConfig.from_pretrained(
            place, revision=revision or "main", trust_remote_code=False, local_files_only=cached
        )
        check_config(config)
        check_fits(config, head)
        if head is not None:
            set_head(config, head)
        quantized = storage_config_of(config)
        if quantized is not None:
            config.quantization_config = quantized.to_dict()
            _check_storage(quantized, storage)
        quantizing = None if quantized is not None or storage is None else config_for(storage, targets)
        found: Any = CLASSES["causal" if head is None else head.task].from_pretrained(
            place,
            config=config,
            dtype=wanted,
            revision=revision or "main",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=cached,
            ignore_mismatched_sizes=True,  # refused below, with their names
            output_loading_info=True,
            **({} if quantizing is None else {"quantization_config": quantizing}),
        )
        model, info = found
        info = known(info, new_parts(model, head, info))
        if head is not None:
            without_new_pooler(model, head)
        check_complete(info, what)
        if getattr(model, "hf_quantizer", None) is None:
            check_dense(info, QUANTIZED)
        check_finite(model)
        if folder != path:  # an adapter's files name the base by this
            model.config._name_or_path = os.path.abspath(path) if os.path.exists(path) else path
        if quantized is not None and storage is not None:
            dense = sorted(set(targets_.resolve(model, targets)) - storages_in(model).keys())
            if dense:
                raise ValueError(f"is quantized already, but not in {', '.join(dense[:3])}; load the original model")
    for record in reports if head is None else ():  # of tensors in the files that the model does not use
        logging.getLogger(record.name).handle(record)
    return model.eval()


def load_tokenizer(path: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model in a local folder, a GGUF file or on the hub. Raises BaseError if there is none."""
    with from_files(path, "tokenizer"):
        folder = tokenizer_folder_of(path, revision=revision)
    cached = check_path(folder)
    with from_files(path, "tokenizer"):
        found = AutoTokenizer.from_pretrained(
            folder, revision=revision or "main", trust_remote_code=False, local_files_only=cached
        )
        found.decode(found("a b")["input_ids"])  # some values of a wrong type are used first here
    return found


def save_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    format: str = "reparam",
    overwrite: bool = False,
) -> None:
    """Write a dense or quantized model and, optionally, its tokenizer into a new folder, atomically.

    Quantized matrices stay quantized. `format` is "reparam" (for `load_base`, and for transformers once
    `reparam.hf.models` is imported) or "bitsandbytes" (for transformers with bitsandbytes, and for `load_base`).
    With `overwrite`, all that `folder` holds is deleted; by default, files that the model does not replace cause a
    FileExistsError.

    Raises ValueError if the model has adapters, if `folder` is, contains or lies in the folder that the model was
    loaded from, if a parameter holds NaN or infinity, and if the format cannot store the quantized matrices.
    """
    target = Path(folder).resolve()
    check_without_adapters(model)
    check_not_base(target, str(model.config._name_or_path))  # type: ignore[union-attr]
    entry = _entry(model, format)
    check_finite(model)
    with staged_folder(target, owned=overwrite) as staging:
        with _quantizer_of(model), waiting(f"writing {target}"), waits_of_transformers():
            model.save_pretrained(staging, state_dict=model.state_dict())  # type: ignore[operator]
        order_metadata(staging)
        if entry is not None:
            file = staging / "config.json"
            config = {**json.loads(file.read_text()), "quantization_config": entry}
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)


def check_not_base(folder: str | Path, base: str) -> None:
    """Raise ValueError if `folder` is the folder of the base model, contains it or lies in it."""
    target, source = Path(folder).resolve(), Path(base).resolve()
    if base and source.exists() and (target == source or source in target.parents or target in source.parents):
        raise ValueError(
            f"{folder}: is the folder of the base model {base}, contains it or lies in it; choose another folder"
        )


def vocabulary(model: nn.Module) -> int:
    """The size of the vocabulary: the number of rows of the input embedding."""
    module = model.get_input_embeddings()  # type: ignore[operator]
    return int(module.weight.shape[0])


def storage_config_of(config: Any) -> StorageConfig | None:
    """The quantization config of a model that reparam or bitsandbytes wrote; None for any other model."""
    values = getattr(config, "quantization_config", None)
    if not isinstance(values, dict):
        return None
    if values.get("quant_method") == METHOD:
        return StorageConfig.from_dict(values)
    return from_bitsandbytes(values) if values.get("quant_method") == "bitsandbytes" else None


def _check_storage(quantized: StorageConfig, storage: Storage | None) -> None:
    if storage is not None and storage != quantized.storage:
        raise ValueError(
            f"is quantized already, as {quantized.storage}; quantizing it again, as {storage}, would lose "
            f"precision twice: load the original model, or leave the storage out"
        )


def _entry(model: nn.Module, format: str) -> dict[str, Any] | None:
    """The `quantization_config` of a quantized model for `config.json`; None for a dense model."""
    if format not in ("reparam", "bitsandbytes"):
        raise ValueError(f"format={format!r}: expected 'reparam' or 'bitsandbytes'")
    if format == "bitsandbytes":
        return to_bitsandbytes(model)
    return config_of(model).to_dict() if storages_in(model) else None


@contextlib.contextmanager
def _quantizer_of(model: Any) -> Iterator[None]:
    """Give a model that was quantized after loading a quantizer while it is saved, which writes the digest."""
    if not storages_in(model) or getattr(model, "hf_quantizer", None) is not None:
        yield
        return
    model.hf_quantizer = hf_quantizer.Quantizer(config_of(model))
    try:
        yield
    finally:
        del model.hf_quantizer
