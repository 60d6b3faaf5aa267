"""The files that hold rows, one reader each, and how a name given by the user becomes rows.

A name is a file, a glob of files, a folder of files, a folder written by `datasets`, the id of a data set on the hub
(`owner/name`, `owner/name@revision`, `owner/name:split`), or - for JSONL on standard input. Files may be compressed
with gzip or zstd.
"""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from reparam.data.files import arrow, hub, jsonl, lines, table, unnamed
from reparam.errors import DataError

Objects = Iterator[tuple[str, "dict[str, Any] | DataError"]]
"""Pairs of a place ("file:line") and the object there, or the error of this place."""

READERS: dict[str, Callable[[Path], Objects]] = {
    ".jsonl": jsonl.read,
    ".ndjson": jsonl.read,
    ".json": jsonl.read_json,
    ".csv": table.read,
    ".tsv": table.read,
    ".parquet": arrow.read_parquet,
    ".arrow": arrow.read_ipc,
    ".feather": arrow.read_ipc,
}
TEXT = ".txt"
COMPRESSED = (".gz", ".zst")
_HUB = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?(:[\w-]+)?")


def objects(name: str | Path, *, streaming: bool = False) -> Objects:
    """The objects of a file, or of all files that the name stands for, in order.

    With `streaming`, a data set on the hub is read from there as it is used, and not downloaded as a whole.

    Raises DataError if there is no such file, or if it cannot be read at all.
    """
    text = str(name)
    if text == "-":
        return jsonl.read_standard_input()
    path = Path(text)
    if path.is_dir():
        return hub.read_folder(path) if hub.is_saved(path) else _all(_files_in(path))
    if path.exists():
        return reader(path)(path)
    if files := files_of(name):
        return _all(files)
    if path.is_symlink():
        raise DataError([f"{path}: is a link that leads to no file"])
    if _HUB.fullmatch(text) and kind(path) not in READERS and not path.parent.is_dir():
        return hub.numbered(hub.streamed(text), text) if streaming else hub.read(text)
    raise DataError([f"{path}: no such file{_nearby(path)}"])


def files_of(name: str | Path) -> list[Path] | None:
    """The files that hold the rows of a source, or None if it is standard input or a data set on the hub."""
    path = Path(name)
    if str(name) == "-":
        return None
    if path.is_dir():
        return [each for each in sorted(path.rglob("*")) if each.is_file()] if hub.is_saved(path) else _files_in(path)
    if path.exists():
        return [path]
    return [Path(each) for each in sorted(glob.glob(str(name), recursive=True)) if Path(each).is_file()] or None


def split_sources(value: str | Sequence[str]) -> tuple[str, ...]:
    """The names in a list of sources: separated by commas, unless there is a file of the whole name.

    >>> split_sources("a.jsonl, owner/name:train")
    ('a.jsonl', 'owner/name:train')
    """
    if not isinstance(value, str):
        return tuple(value)
    if "," not in value or Path(value).exists() or glob.glob(value):
        return (value,)
    return tuple(part.strip() for part in value.split(",") if part.strip())


def kind(path: Path) -> str:
    """The suffix that says what the file holds, without that of a compression: ".jsonl" for rows.jsonl.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def reader(path: Path) -> Callable[[Path], Objects]:
    """The reader of a file. With another suffix than those of READERS, its content tells it.

    The lines of a .txt file are texts, unless it begins as JSON. Raises DataError for a file that holds no rows.
    """
    suffix = kind(path)
    return READERS.get(suffix) or unnamed.reader(path, suffix, text=lines.read if suffix == TEXT else None)


def texts_of(name: str | Path) -> list[Path]:
    """The files of a source whose lines are texts."""
    return [path for path in files_of(name) or () if kind(path) == TEXT and reader(path) is lines.read]


def _all(paths: list[Path]) -> Objects:
    for path in paths:
        yield from reader(path)(path)


def _files_in(folder: Path) -> list[Path]:
    """The data files of a folder: those that are named after the split "train", if there are any, otherwise all."""
    every = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [path for path in every if kind(path) in READERS]
    files = [path for path in files if path.name not in ("dataset_info.json", "state.json")]
    files = files or [path for path in every if kind(path) == TEXT]  # beside others, a text is a note about them
    if not files:
        raise DataError([f"{folder}: the folder holds no data files; expected {', '.join(READERS)} or {TEXT}"])
    if len({reader(path) for path in files}) > 1:
        names = ", ".join(path.name for path in files[:6])
        raise DataError([f"{folder}: the folder holds files of several kinds ({names}); name one file or a glob"])
    return [path for path in files if re.match(r"train(\b|[-_.])", path.name)] or files


def _nearby(path: Path) -> str:
    """A hint at files with similar names."""
    if not path.parent.is_dir():
        return f"; its folder {path.parent} does not exist"
    names = sorted(each.name for each in path.parent.iterdir() if each.is_file())
    near = difflib.get_close_matches(path.name, names, cutoff=0.5)
    near = near or [name for name in names if kind(Path(name)) in READERS][:3]
    return f"; that folder contains {', '.join(near)}" if near else ""
