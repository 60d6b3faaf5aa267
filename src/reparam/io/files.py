"""Reading and writing adapters: the format is told by the files, and a folder is replaced whole or not at all."""

from __future__ import annotations

from pathlib import Path

from reparam.io import native, peft
from reparam.io.record import FormatError, Record
from reparam.io.staged import staged_folder

FORMATS = {"reparam": native, "peft": peft}
OURS = {native.WEIGHTS, native.CONFIG, peft.WEIGHTS, peft.CONFIG, "README.md"}


def read(folder: str | Path) -> Record:
    """The adapter in `folder`, in either format. Raises FormatError where there is none or it is damaged."""
    folder = Path(folder)
    found = [module for module in FORMATS.values() if (folder / module.CONFIG).exists()]
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such folder")
    if len(found) != 1:
        what = "both" if found else "neither"
        raise FormatError(f"{folder}: expected {native.CONFIG} or {peft.CONFIG}, found {what}")
    return found[0].read(folder)


def write(folder: str | Path, record: Record, *, format: str = "reparam") -> None:
    """Put the adapter into `folder`, which is made, or replaced if it holds an adapter and nothing else."""
    folder = Path(folder)
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: expected one of {', '.join(FORMATS)}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; give a folder")
    foreign = sorted(p.name for p in folder.iterdir() if p.name not in OURS) if folder.exists() else []
    if foreign:
        raise ValueError(
            f"{folder}: holds other files ({', '.join(foreign[:3])}), which would be lost; give a new folder"
        )
    contents = FORMATS[format].files(record)
    with staged_folder(folder, owned=True) as staging:
        for name, content in contents.items():
            (staging / name).write_bytes(content)


def format_of(folder: str | Path) -> str:
    """The name of the format that `read` finds in this folder."""
    return next(name for name, module in FORMATS.items() if (Path(folder) / module.CONFIG).exists())
