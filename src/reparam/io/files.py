"""Read and write adapters. Reading detects the format from the files; writing replaces a folder atomically."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

import torch

from reparam.core.checks import listed
from reparam.core.plain import decode
from reparam.errors import FormatError
from reparam.io import head, native, peft, prompt_format, whole
from reparam.io.head import Head
from reparam.io.prompt_format import PromptFormat
from reparam.io.record import Record
from reparam.io.staged import between_renames, staged_folder
from reparam.io.steady import steady

FORMATS = {"reparam": native, "peft": peft}


def read(folder: str | Path, name: str | None = None) -> Record:
    """Read the adapter in `folder`, in either format, or the adapter `name` in a whole model's files.

    If another process replaces the adapter meanwhile, the result is the old one or the new one. Raises FormatError if
    there is none or a file is damaged.
    """
    folder = Path(folder)
    return steady(folder, lambda: _read(folder, name))


def _read(folder: Path, name: str | None) -> Record:
    if not folder.is_dir():
        raise FormatError(f"{folder}: {'is a file; give its folder' if folder.exists() else 'no such folder'}")
    found = [module for module in FORMATS.values() if (folder / module.CONFIG).exists()]
    if len(found) == 1:
        record = found[0].read(folder)
        return dataclasses.replace(record, prompt_format=prompt_format_of(folder), head=head_of(folder) or record.head)
    if found:
        raise FormatError(f"{folder}: holds both {native.CONFIG} and {peft.CONFIG}; move one of the two adapters away")
    if whole.has_adapters(folder):
        return whole.read(folder, name)
    for file in (*folder.glob("pytorch_lora_weights.*"), *folder.glob("*.ckpt")):
        raise FormatError(
            f"{file}: in the format of diffusers or kohya's scripts, for diffusion models, which is not supported"
        )
    below = sorted({file.parent.name for module in FORMATS.values() for file in folder.glob(f"*/{module.CONFIG}")})
    hint = f". Give one of its subfolders: {', '.join(below)}" if below else ""
    raise FormatError(f"{folder}: no adapter here: neither {native.CONFIG} nor {peft.CONFIG} was found{hint}")


def adapter_folder(folder: str | Path) -> Path:
    """The folder of an adapter, given that folder itself or the folder of its training run."""
    path = Path(folder)
    inside = path / "adapter"
    return inside if not _holds(path) and (_holds(inside) or between_renames(inside) or _holds(inside)) else path


def prompt_format_of(folder: Path) -> PromptFormat | None:
    """How the adapter in `folder` is prompted; None if its files do not say. Raises FormatError for a damaged file."""
    file = folder / prompt_format.FILE
    return decode(PromptFormat, native.read_json(file), file) if file.exists() else None


def head_of(folder: Path) -> Head | None:
    """What the model of the adapter in `folder` is for; None if `task.json` is missing.

    Raises FormatError for a damaged file.
    """
    file = folder / head.FILE
    if not file.exists():
        return None
    found = decode(Head, native.read_json(file), file)
    if len(set(found.labels)) < len(found.labels) or (found.regression and found.labels):
        raise FormatError(f"{file}: labels: expected different names, and none for a regression")
    return found


def has_head(folder: Path) -> bool:
    """Whether the adapter in `folder` is for another task than causal language modeling; this reads no tensors."""
    if (folder / head.FILE).exists():
        return True
    file = folder / peft.CONFIG
    return file.exists() and str(native.read_json(file).get("task_type")) in head.PEFT_TYPES


def _holds(folder: Path) -> bool:
    return any((folder / module.CONFIG).exists() for module in FORMATS.values())


def write(folder: str | Path, record: Record, *, format: str = "reparam") -> None:
    """Write the adapter into `folder` atomically.

    Creates the folder, or replaces it if it holds only an adapter in this format. Raises ValueError if the format is
    unknown, a tensor has NaN or infinity, or `folder` is a file or holds other files.
    """
    folder = Path(folder)
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: expected one of {', '.join(FORMATS)}")
    bad = [key for key, t in record.tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if bad:
        raise ValueError(f"{folder}: the adapter has NaN or infinity in {listed(bad)}, so it was not written")
    contents = FORMATS[format].files(record)
    if record.prompt_format is not None:
        contents[prompt_format.FILE] = record.prompt_format.content()
    if record.head is not None:
        contents[head.FILE] = record.head.content()
    check_holds_only(folder, {*contents, prompt_format.FILE, head.FILE})
    with staged_folder(folder, owned=True) as staging:
        for name, content in contents.items():
            (staging / name).write_bytes(content)


def check_holds_only(folder: Path, names: Collection[str]) -> None:
    """Raise ValueError if `folder` is a file, or a folder with anything but files of these names."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; give a folder as output")
    held = list(folder.iterdir()) if folder.exists() else []
    foreign = sorted(p.name for p in held if p.name not in names or not p.is_file())
    if foreign:
        raise ValueError(
            f"{folder}: holds other files ({', '.join(foreign[:3])}), which saving would delete; give a new folder"
        )


def format_of(folder: str | Path) -> str:
    """The format of the adapter in this folder, "reparam" or "peft"."""
    return next(name for name, module in FORMATS.items() if (Path(folder) / module.CONFIG).exists())
