"""Tell whether a folder holds a model that sees, without loading anything."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

SETTINGS = "vora.json"
"""The file with the settings of a model that sees."""
RUN = "vora"
"""The folder of the model in that of a training run."""
ADAPTER, LANGUAGE = "adapter", "language"
"""The folders of its adapter and, once that is merged, of its language model."""


def vora_folder(folder: str | Path) -> Path | None:
    """The folder of a model that sees, given that folder itself or that of its training run; None if there is none."""
    path = Path(folder)
    return next((each for each in (path, path / RUN) if (each / SETTINGS).is_file()), None)


def is_seeing(names: Iterable[str | None]) -> bool:
    """Whether one of these folders holds a model that sees."""
    return any(name is not None and vora_folder(name) is not None for name in names)


def part_of(folder: Path) -> Path:
    """For a folder of a model that sees, that of its adapter or of its language model; any other folder as it is."""
    found = vora_folder(folder)
    return folder if found is None else found / (LANGUAGE if (found / LANGUAGE).is_dir() else ADAPTER)
