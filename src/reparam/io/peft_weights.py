"""The weights of a folder that PEFT wrote: safetensors, or a pickle of tensors alone, with PEFT's own keys.

`torch.load(weights_only=True)` is the only unpickling in this package. It builds tensors and plain containers and runs
no code of the file. What it reads is limited before (size, no compressed parts) and checked afterwards (no tensor may
claim more elements than the file holds).

Keys may hold the name that the adapter had in PEFT (`lora_A.default.weight`), as `model.state_dict()` has it, and those
of wrappers (`_orig_mod`, where a part of the model was compiled): they are removed.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from reparam.core.checks import listed
from reparam.errors import FormatError
from reparam.io.native import checked, parse_tensors, read_bytes
from reparam.sites.wrapped import bare_key

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
LARGEST = 16 << 30  # an adapter; whole models have other files
LARGEST_PICKLE = 2 << 30
SAFE_TORCH = (2, 10)  # earlier releases have known ways to run code in spite of weights_only

_NAMED = re.compile(  # the name of an adapter inside a key
    r"^(?P<start>.*\.(?:lora_(?:A|B|E|embedding_A|embedding_B|magnitude_vector)|modules_to_save|trainable_tokens_delta))"
    r"\.(?P<name>(?!weight$|bias$)[^.]+)(?P<end>\..+)?$"
)
_KOHYA = re.compile(r"^lora_(?:unet|te\d?|transformer)_")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of the adapter in this folder, by key, without an adapter's name in the keys.

    Raises FormatError if the file is missing, damaged, too large, or not PEFT's.
    """
    file = folder / WEIGHTS
    if not file.exists() and (folder / PICKLE).exists():
        file = folder / PICKLE
        found = _unpickled(file)
    else:
        found = parse_tensors(read_bytes(file, most=LARGEST), file)
    foreign = next((key for key in found if _KOHYA.match(key)), None)
    if foreign:
        raise FormatError(
            f"{file}: the key {foreign} is in the format of kohya's scripts, for diffusion models, which is not "
            f"supported; convert the file to PEFT's format first"
        )
    return _without_names(found, file)


def weights_file(folder: Path) -> Path:
    """Path of the weights in this folder, for messages."""
    return folder / (PICKLE if not (folder / WEIGHTS).exists() and (folder / PICKLE).exists() else WEIGHTS)


def _without_names(tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The tensors with the adapter's name removed from their keys. Raises FormatError for several adapters."""
    found: dict[str, Tensor] = {}
    names: dict[str, None] = {}
    for full, tensor in tensors.items():
        key = bare_key(full)
        if match := _NAMED.match(key):
            names[match["name"]] = None
            start = match["start"].removesuffix(".modules_to_save")
            key = start + (match["end"] or "")
        key = re.sub(r"\.lora_magnitude_vector\.weight$", ".lora_magnitude_vector", key)
        if key in found and len(names) < 2:
            raise FormatError(
                f"{file}: two tensors have the key {key}, with and without the name of an adapter or of a wrapper"
            )
        found[key] = tensor
    if len(names) > 1:
        raise FormatError(
            f"{file}: holds several adapters ({listed(sorted(names))}); save each of them into its own folder with PEFT"
        )
    return found


def _unpickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` wrote. Raises FormatError for anything but a dictionary of tensors."""
    release = re.match(r"(\d+)\.(\d+)", torch.__version__)
    assert release is not None
    if (int(release[1]), int(release[2])) < SAFE_TORCH:
        raise FormatError(
            f"{file}: a pickle, which torch {torch.__version__} cannot load safely; install torch 2.10 or later, or "
            f"save the adapter again with PEFT, which writes {WEIGHTS}"
        )
    if not file.is_file():
        raise FormatError(f"{file}: not a regular file")
    size = file.stat().st_size
    if size > LARGEST_PICKLE:
        raise FormatError(
            f"{file}: {size:,} bytes, more than the {LARGEST_PICKLE:,} that are read from a pickle; save the adapter "
            f"again with PEFT, which writes {WEIGHTS}"
        )
    try:
        with zipfile.ZipFile(file) as archive:
            packed = [part.filename for part in archive.infolist() if part.compress_type != zipfile.ZIP_STORED]
            total = sum(part.file_size for part in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        read_bytes(file, most=LARGEST_PICKLE)  # names an empty or unreadable file, and a pointer of git-LFS
        raise FormatError(f"{file}: not a complete file of torch.save ({error})") from None
    if packed or total > size:
        raise FormatError(f"{file}: has compressed or overlapping parts, which torch.save does not write")
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, KeyError, EOFError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FormatError(f"{file}: not a file of tensors alone: {first}") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise FormatError(f"{file}: expected tensors by key, found {type(found).__name__}")
    odd = [
        key
        for key, value in found.items()
        if not isinstance(value, Tensor)
        or value.layout is not torch.strided
        or value.device.type != "cpu"
        or value.numel() * value.element_size() > value.untyped_storage().nbytes()
    ]
    if odd:
        raise FormatError(f"{file}: not whole dense tensors: {listed(odd)}")
    return checked({key: value.detach() for key, value in found.items()}, file)
