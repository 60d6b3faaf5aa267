"""Data sets of the Hugging Face library `datasets`: folders that it wrote, and ids on the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reparam.data.files.reach import unreachable
from reparam.errors import DataError


def is_saved(folder: Path) -> bool:
    """Whether `datasets` wrote this folder with `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def read_folder(folder: Path, skip: int = 0) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """The rows of a folder that `datasets` wrote, after `skip`; of several splits, those of "train"."""
    datasets = _library(str(folder))
    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError([f"{folder}: cannot be read: {_reason(error)}"]) from error
    found = _split(found, str(folder), "train")
    yield from numbered(found.select(range(skip, len(found))), str(folder), skip + 1)


def read(name: str) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """The rows of a data set on the hub: "owner/name", with "@revision" and ":split" (by default, "train")."""
    yield from numbered(_loaded(name, streaming=False), name)


def streamed(name: str) -> Any:
    """The same data set as an IterableDataset, which is read from the hub as it is used."""
    return _loaded(name, streaming=True)


def numbered(found: Any, name: str, first: int = 1) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """The rows of a data set with their places; `first` is the number of the first one."""
    try:
        for number, value in enumerate(found, start=first):
            yield f"{name}:row {number}", value
    except Exception as error:  # a streamed data set is read over the network: see `_loaded`
        raise DataError([f"{name}: cannot be read on: {_reason(error)}"]) from error


def _loaded(name: str, *, streaming: bool) -> Any:
    datasets = _library(name)
    path, _, split = name.partition(":")
    path, _, revision = path.partition("@")
    cached = list(Path(datasets.config.HF_DATASETS_CACHE).expanduser().glob(f"{path.partition('/')[0]}___*"))
    if not cached and (why := unreachable()):
        raise DataError([f"{name}: no such file, and no data set of this name is in the cache of datasets ({why})"])
    try:
        found = datasets.load_dataset(path, split=split or "train", revision=revision or None, streaming=streaming)
    except Exception as error:  # network, authorization, unknown names and splits: each library has its own classes
        raise DataError(
            [f"{name}: no such file, and the data set cannot be read from the hub: {_reason(error)}"]
        ) from error
    return _split(found, name, split or "train")


def _split(found: Any, name: str, split: str) -> Any:
    if isinstance(found, dict):
        if split not in found:
            raise DataError([f"{name}: no split {split!r}; the data set has {', '.join(found)}"])
        return found[split]
    return found


def _library(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(
            [f"{name}: reading data sets needs the library datasets: pip install 'reparam[data]'"]
        ) from None
    return datasets


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
