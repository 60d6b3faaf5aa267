"""The folder of a model that sees.

vora.json            the settings: pixels and patches, blocks, mask
vision.safetensors   the patch embedding
adapter/             the adapter, an ordinary one, whose files name its base; or, once it is merged:
language/            the language model, a plain folder that any tool loads
prompt_format.json   how the model is prompted, if that is known
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from reparam.core.checks import listed
from reparam.core.plain import decode
from reparam.errors import FormatError
from reparam.hf.models import load_base, load_tokenizer, save_model
from reparam.hf.open import open_model
from reparam.io import prompt_format
from reparam.io.files import prompt_format_of
from reparam.io.native import pack_tensors, parse_tensors, read_bytes, read_json
from reparam.io.outputs import check_replaceable
from reparam.io.staged import staged_folder
from reparam.vision.found import ADAPTER, LANGUAGE, RUN, SETTINGS, vora_folder
from reparam.vision.model import VoRA
from reparam.vision.patches import Vision
from reparam.vision.processor import Processor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reparam.adapter.adapter import Adapter

TENSORS = "vision.safetensors"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Settings:
    """The content of `vora.json`."""

    format: int
    vision: Vision
    blocks: int
    mask: Literal["image", "causal"] = "image"


def check_vora_folder(output: Path, *, overwrite: bool) -> None:
    """Raise ValueError unless `output` is absent or empty or, with `overwrite`, holds a model that sees alone."""
    own = {SETTINGS, TENSORS, ADAPTER, LANGUAGE, prompt_format.FILE}
    check_replaceable(output, lambda entry: entry.name in own, overwrite=overwrite)


def save(vora: VoRA, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write a model that sees into `folder`, atomically. Neither teacher nor heads are written.

    While its adapter is not merged, the folder holds no language model, only the adapter. Raises ValueError if a tensor
    is NaN or infinite, if the folder holds other files (with `overwrite`, they are deleted), and if a merged model has
    no processor, which has its tokenizer.
    """
    tensors = vora.embedding.state_dict()
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise ValueError(f"{folder}: the patch embedding has NaN or infinity in {listed(bad)}, so it was not written")
    if vora.adapter is None and vora.processor is None:
        raise ValueError(
            "a merged model is saved with its tokenizer: set vora.processor = Processor(tokenizer, vision)"
        )
    settings = Settings(FORMAT, vora.vision, vora.blocks, vora.mask)
    with staged_folder(folder, owned=overwrite) as staging:
        (staging / SETTINGS).write_text(json.dumps(dataclasses.asdict(settings), indent=1) + "\n")
        (staging / TENSORS).write_bytes(pack_tensors(tensors))
        told = vora.processor.prompt_format if vora.processor is not None else None
        if told is not None:
            (staging / prompt_format.FILE).write_bytes(told.content())
        if vora.adapter is not None:
            vora.adapter.save(staging / ADAPTER)
        else:
            assert vora.processor is not None
            save_model(vora.language, vora.processor.tokenizer, staging / LANGUAGE)


def load(folder: str | Path, *, base: str | None = None, dtype: str = "auto", attention: str | None = None) -> VoRA:
    """Load a model that sees, in eval mode, with its processor: `load(folder).generate(images=[...], text="...")`.

    Args:
        folder: the folder, or that of the training run that wrote it.
        base: the folder or hub id of the base of an adapter; by default the one that its files name.
        dtype: dtype of the language model, or "auto".
        attention: "sdpa", "eager" or "flex_attention"; by default transformers' choice.

    Raises FormatError for a folder without such a model, or with damaged files, and BaseError if the language model
    cannot be loaded. Code and pickles are never read.
    """
    found = vora_folder(folder)
    if found is None:
        raise FormatError(f"{folder}: no model that sees: neither {SETTINGS} nor {RUN}/{SETTINGS} is there")
    language, tokenizer, adapter = _language(found, base, dtype)
    if attention is not None:
        language.set_attn_implementation(attention)
    return assembled(found, language, tokenizer, adapter)


def assembled(folder: Path, language: Any, tokenizer: PreTrainedTokenizerBase, adapter: Adapter | None = None) -> VoRA:
    """The model that sees whose files are in `folder`, on a language model that is loaded. Raises as `load` does."""
    settings = read_settings(folder)
    vora = VoRA(language, vision=settings.vision, blocks=settings.blocks, method=None, mask=settings.mask)
    vora.adapter = adapter
    file = folder / TENSORS
    _fill(vora, parse_tensors(read_bytes(file), file), file)
    vora.processor = Processor(tokenizer, settings.vision, prompt_format_of(folder))
    return vora.eval()


def read_settings(folder: Path) -> Settings:
    """The settings in `vora.json`. Raises FormatError, with the file and the key, for damaged ones."""
    file = folder / SETTINGS
    try:
        settings = decode(Settings, read_json(file), file)
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(f"{file}: {error}") from None
    if settings.format != FORMAT:
        raise FormatError(f"{file}: format {settings.format}, and this release reads {FORMAT}; update reparam")
    return settings


def _language(folder: Path, base: str | None, dtype: str) -> tuple[Any, Any, Any]:
    if (folder / LANGUAGE).is_dir():
        if base is not None:
            raise FormatError(f"{folder}: holds its own language model, so leave out the base")
        path = str(folder / LANGUAGE)
        return load_base(path, dtype=dtype), load_tokenizer(path), None
    if not (folder / ADAPTER).is_dir():
        raise FormatError(f"{folder}: holds neither {LANGUAGE}, a language model, nor {ADAPTER}; get it again")
    return open_model(base, folder / ADAPTER, dtype=dtype)


def _fill(vora: VoRA, tensors: dict[str, Tensor], file: Path) -> None:
    """Copy the tensors of a file into the patch embedding. Raises FormatError if they do not fit or are not finite."""
    wanted = vora.embedding.state_dict()
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        problem = f"lacks {listed(missing)}" if missing else f"holds {listed(extra)}, which no patch embedding has"
        raise FormatError(f"{file}: {problem}; get the file again")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise FormatError(
                f"{file}: {name} has the shape {list(tensor.shape)}, and the settings and the language model need "
                f"{list(wanted[name].shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise FormatError(f"{file}: {name} holds NaN or infinity; get the file again")
    vora.embedding.load_state_dict(tensors)
