"""Read and write adapters. Reading detects the format from the files; writing replaces a folder atomically."""

from __future__ import annotations

from pathlib import Path

from reparam.errors import FormatError
from reparam.io import native, peft, whole
from reparam.io.record import Record
from reparam.io.staged import staged_folder

FORMATS = {"reparam": native, "peft": peft}


def read(folder: str | Path, name: str | None = None) -> Record:
    """Read the adapter in `folder`, in either format, or the adapter `name` in a whole model's files.

    Raises FormatError if there is none or a file is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FormatError(f"{folder}: {'is a file; give its folder' if folder.exists() else 'no such folder'}")
    found = [module for module in FORMATS.values() if (folder / module.CONFIG).exists()]
    if len(found) == 1:
        return found[0].read(folder)
    if found:
        raise FormatError(f"{folder}: holds both {native.CONFIG} and {peft.CONFIG}; move one of the two adapters away")
    if whole.has_adapters(folder):
        return whole.read(folder, name)
    below = sorted({file.parent.name for module in FORMATS.values() for file in folder.glob(f"*/{module.CONFIG}")})
    hint = f". Give one of its subfolders: {', '.join(below)}" if below else ""
    raise FormatError(f"{folder}: no adapter here: neither {native.CONFIG} nor {peft.CONFIG} was found{hint}")


def adapter_folder(folder: str | Path) -> Path:
    """The folder of an adapter, given that folder itself or the folder of its training run."""
    path = Path(folder)
    inside = any((path / "adapter" / module.CONFIG).exists() for module in FORMATS.values())
    return path / "adapter" if inside else path


def write(folder: str | Path, record: Record, *, format: str = "reparam") -> None:
    """Write the adapter into `folder` atomically.

    Creates the folder, or replaces it if it holds only an adapter in this format. Raises ValueError if the format is
    unknown, or if `folder` is a file or holds other files.
    """
    folder = Path(folder)
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: expected one of {', '.join(FORMATS)}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; give a folder as output")
    contents = FORMATS[format].files(record)
    foreign = sorted(p.name for p in folder.iterdir() if p.name not in contents) if folder.exists() else []
    if foreign:
        raise ValueError(
            f"{folder}: holds other files ({', '.join(foreign[:3])}), which saving would delete; give a new folder"
        )
    with staged_folder(folder, owned=True) as staging:
        for name, content in contents.items():
            (staging / name).write_bytes(content)


def format_of(folder: str | Path) -> str:
    """The format of the adapter in this folder, "reparam" or "peft"."""
    return next(name for name, module in FORMATS.items() if (Path(folder) / module.CONFIG).exists())
