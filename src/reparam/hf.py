"""Models and tokenizers of transformers: loading with clear refusals, and writing a merged model safely."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from reparam.base import nearest
from reparam.io.staged import staged_folder
from reparam.linear import Adapted, Replaced


class BaseError(ValueError):
    """A base model cannot be loaded as asked."""


def load_base(path: str, *, dtype: str = "auto", revision: str | None = None) -> nn.Module:
    """The causal language model in a local folder or on the hub, in eval mode.

    Weights are read from safetensors only, and no code of the repository is run. Raises BaseError, in one sentence,
    for a folder that does not exist or holds no such model, and for a hub that cannot be reached.
    """
    _check_path(path)
    logging.disable_progress_bar()
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=wanted, revision=revision or "main", use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise BaseError(f"{path}: no causal language model could be loaded: {_first_line(error)}") from error
    return model.eval()


def load_tokenizer(path: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model. Raises BaseError."""
    _check_path(path)
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise BaseError(f"{path}: no tokenizer could be loaded: {_first_line(error)}") from error


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, folder: str | Path) -> None:
    """Write a plain model, and its tokenizer, into a new folder; whole, or not at all.

    Raises ValueError while adapters are on the model (stock tools could not read it), and for the folder that the base
    came from, which would be overwritten.
    """
    target = Path(folder).resolve()
    if any(isinstance(module, Adapted | Replaced) for module in model.modules()):
        raise ValueError("the model has adapters on it; reparam.merge(model) first, or save the adapter alone")
    check_not_base(target, str(model.config._name_or_path))  # type: ignore[union-attr]
    with staged_folder(target) as staging:
        model.save_pretrained(staging)  # type: ignore[operator]
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
    return int(module.weight.out_features if isinstance(module, Adapted) else module.weight.shape[0])


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
