"""Which folders of adapters a server reads: those whose files are in its folder, and no pickles."""

from __future__ import annotations

from pathlib import Path

from reparam.errors import FormatError
from reparam.io.files import adapter_folder
from reparam.io.peft_weights import PICKLE, weights_file


def outside(folder: Path, root: Path) -> Path | None:
    """The folder of an adapter, or the first of its files, if it is a link that leads out of `root`; otherwise None."""
    inside, real = adapter_folder(folder), root.resolve()
    held = sorted(inside.iterdir()) if inside.is_dir() and inside.resolve().is_relative_to(real) else []
    return next((path for path in (inside, *held) if not path.resolve().is_relative_to(real)), None)


def check_inside(folder: Path, root: Path) -> None:
    """Raise FormatError if an adapter, or one of its files, is a link that leads out of `root`."""
    found = outside(folder, root)
    if found is not None:
        raise FormatError(f"{found}: is a link that leads out of {root}; put the adapter itself there")


def check_no_pickle(folder: Path) -> None:
    """Raise FormatError if the weights of an adapter are a pickle, which could hold code."""
    if weights_file(folder).name == PICKLE:
        raise FormatError(
            f"{weights_file(folder)}: is a pickle, and only safetensors are served; load the adapter with PEFT and "
            f"save it again"
        )
