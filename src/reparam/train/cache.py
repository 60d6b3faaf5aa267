"""Keep encoded rows in a folder, to use them again in a later run on the same rows.

Each data set is a folder named after its key: a digest of everything that determines the arrays, the content of the
files and the tokenizer among it. It holds one file for each array of `data.flat`, and `corpus.json` with the rest and
with the SHA-256 of each file. What is read is checked against these, and against the other arrays; a damaged data set
is made again. The files are mapped into memory, so a data set can be larger than it.
The time of a folder's change is that of its last use.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import reparam.data
from reparam.core.strict_json import loads
from reparam.core.text import counted, sized
from reparam.data.corpus import Corpus
from reparam.data.flat import TYPES, mapped
from reparam.errors import ConfigError
from reparam.io.native import read_bytes
from reparam.io.outputs import check_writable
from reparam.io.staged import digest, locks, recover, staged_folder

FORMAT = 2
REST = "corpus.json"
KEY = re.compile("[0-9a-f]{32}")
LARGEST = 1 << 26  # bytes of corpus.json


def key_of(files: Sequence[Path], settings: Mapping[str, Any]) -> str:
    """The key of the rows of these files, encoded with these settings by this version of the code."""
    parts = {
        "code": [digest(file) for file in sorted(Path(reparam.data.__file__).parent.rglob("*.py"))],
        "files": [digest(file) for file in files],
        "settings": settings,
    }
    return _sha256(json.dumps(parts, sort_keys=True, default=str))[:32]


def content_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of what turns text into token ids. Truncation and padding are left out: callers set them each time."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {}
    plain = [{**state, "truncation": None, "padding": None}, tokenizer.special_tokens_map]
    return _sha256(json.dumps(plain, sort_keys=True, default=str))


def kept(
    folder: Path, key: str, files: Sequence[Path], make: Callable[[Path], Corpus], *, limit: int
) -> tuple[Corpus, str]:
    """The corpus with this key from the folder, or else the one that `make` writes into the folder that it is given.

    After one was made, others are deleted while the folder holds more than `limit` bytes, least recently used first.

    Returns the corpus, and a sentence on where it is kept. If another process is making it, this one waits. Raises
    ConfigError if the folder is a file, and WriteFailed or DiskFull if it cannot be written.
    """
    place, damaged = folder / key, ""
    if found := _read(place, files):
        return found, f"read from the cache, {place} ({sized(_size(place))})"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"data.cache: {folder} is a file; give a folder, or off")
    check_writable(folder, inside=True)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder / f".{key}.lock"):
        if place.exists():
            try:
                return _checked(place, files), f"read from the cache, {place} ({sized(_size(place))})"
            except (OSError, ValueError, KeyError, TypeError) as error:
                if place.exists():  # otherwise another process has deleted it to make room
                    damaged = f"; what it held was damaged ({error}) and is replaced"
                    shutil.rmtree(place, ignore_errors=True)
        with staged_folder(place) as staged:
            corpus = make(staged)
            _write(staged, corpus, files)
    removed = _evicted(folder, limit, keep=place)
    told = f"kept in the cache, {place} ({sized(_size(place))}, {sized(_size(folder))} in all){damaged}"
    if removed:
        sets = counted(len(removed), "data set")
        told += f"; {sets} not used for the longest time made room ({sized(sum(removed))}; data.cache_limit)"
    return corpus, told


def clear(folder: Path) -> list[int]:
    """Delete all data sets in the folder. Returns the sizes of what was deleted, in bytes.

    A run that uses one of them goes on: its mapped files stay until it ends.
    """
    return _evicted(folder, -1) if folder.is_dir() else []


def _evicted(folder: Path, limit: int, *, keep: Path | None = None) -> list[int]:
    """Delete data sets, least recently used first, until `limit` bytes or none but `keep` are left.

    Returns the sizes of those that were deleted. Several processes may do this at once, and read what is deleted: a
    data set gets a hidden name first, so it is whole or absent, and mapped files stay until they are closed.
    """
    recover(folder)
    found = []
    for place in folder.iterdir():
        with suppress(OSError):  # another process may have deleted it
            if KEY.fullmatch(place.name) and place.is_dir() and not place.is_symlink():
                found.append((place.stat().st_mtime, _size(place), place))
    total, removed = sum(size for _, size, _ in found), []
    for _, size, place in sorted(found):
        if total <= limit:
            break
        if place == keep:
            continue
        hidden = place.with_name(f".{place.name}.reparam-new-{os.urandom(6).hex()}")  # `recover` knows such names
        try:
            place.rename(hidden)
        except FileNotFoundError:
            continue
        shutil.rmtree(hidden, ignore_errors=True)
        total -= size
        removed.append(size)
    return removed


def _read(place: Path, files: Sequence[Path]) -> Corpus | None:
    try:
        return _checked(place, files)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(folder: Path, corpus: Corpus, files: Sequence[Path]) -> None:
    """Write all but the arrays of TYPES, which are in the folder already."""
    for number, marked in enumerate(corpus.marks.values()):
        (folder / f"marks-{number}").write_bytes(marked.numpy().tobytes())
    names = [*TYPES, *(f"marks-{number}" for number in range(len(corpus.marks)))]
    rest = {
        "format": FORMAT,
        "digests": {name: digest(folder / name) for name in names},
        "marks": list(corpus.marks),
        "names": corpus.names,
        "tasks": corpus.tasks,
        "reasons": list(corpus.reasons.items()),
        "unused": corpus.unused,
        "max_length": corpus.max_length,
        "largest": corpus.largest,
        "kinds": corpus.kinds,
        "counts": corpus.counts,
        "notes": corpus.notes,
    }
    text = json.dumps(rest)
    for number, file in sorted(enumerate(files), key=lambda pair: -len(str(pair[1]))):
        text = text.replace(_quoted(str(file)), _quoted(f"\0{number}\0"))  # the file may have another path next time
    (folder / REST).write_text(f"{_sha256(text)}\n{text}", encoding="utf-8")


def _checked(folder: Path, files: Sequence[Path]) -> Corpus:
    """The corpus in a folder. Raises OSError, ValueError, KeyError or TypeError if anything is wrong with it."""
    os.utime(folder)  # it was used
    expected, _, text = read_bytes(folder / REST, most=LARGEST).decode().partition("\n")
    if _sha256(text) != expected:
        raise ValueError(f"the content of {REST} has changed")
    for number, file in enumerate(files):
        text = text.replace(_quoted(f"\0{number}\0"), _quoted(str(file)))
    rest = loads(text)
    if rest["format"] != FORMAT:
        raise ValueError(f"its format is {rest['format']!r}")
    arrays = {name: _array(folder, name, kind, rest) for name, kind in TYPES.items()}
    marks = {what: _array(folder, f"marks-{i}", "int64", rest) for i, what in enumerate(rest["marks"])}
    found = Corpus(
        arrays=arrays,
        names=rest["names"],
        tasks=rest["tasks"],
        marks=marks,
        reasons={int(row): str(why) for row, why in rest["reasons"]},
        unused=rest["unused"],
        max_length=rest["max_length"],
        largest=rest["largest"],
        kinds={str(kind): int(count) for kind, count in rest["kinds"].items()},
        counts=tuple(rest["counts"]),
        notes=tuple(rest["notes"]),
    )
    _check_ranges(found)
    return found


def _array(folder: Path, name: str, kind: str, rest: Mapping[str, Any]) -> Tensor:
    file = folder / name
    if digest(file) != rest["digests"][name]:
        raise ValueError(f"the content of {name} has changed")
    size, remainder = divmod(file.stat().st_size, np.dtype(kind).itemsize)
    if remainder:
        raise ValueError(f"{name} has a wrong size")
    return mapped(file, kind, size)


def _check_ranges(corpus: Corpus) -> None:
    """Raise ValueError if the arrays do not fit each other."""
    of = {name: array.numpy() for name, array in corpus.arrays.items()}
    rows, examples, tokens = len(of["tokens"]), len(of["lengths"]), len(of["ids"])
    right = (
        all(len(of[name]) == rows for name in ("file", "line", "task", "flags"))
        and all(len(of[name]) == examples for name in ("loss_tokens", "text_bytes", "row"))
        and tokens == len(of["loss"]) == int(of["lengths"].sum(dtype=np.int64))
        and _within(of["lengths"], 1, corpus.max_length + 1)
        and _within(of["row"], 0, rows)
        and bool((np.diff(of["row"]) >= 0).all())
        and _within(of["file"], 0, len(corpus.names))
        and _within(of["task"], -1, len(corpus.tasks))
        and all(_within(marked.numpy(), 0, rows) for marked in corpus.marks.values())
        and sum(corpus.counts) == rows
    )
    if not right:
        raise ValueError("its arrays do not fit each other")


def _within(values: np.ndarray, least: int, end: int) -> bool:
    return not len(values) or (int(values.min()) >= least and int(values.max()) < end)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _quoted(text: str) -> str:
    return json.dumps(text)[1:-1]


def _size(folder: Path) -> int:
    """Bytes of the files in a folder; what another process deletes meanwhile, even the folder, does not count."""
    total = 0
    for root, _, names in os.walk(folder):  # unlike rglob, it goes on where a folder has vanished
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(root, name)).st_size
    return total


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Let one process at a time into the block."""
    while True:
        with os.fdopen(locks(file)) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_open(file, lock):  # the process before deleted it, and another one may lock a new file
                continue
            try:
                yield
            finally:
                file.unlink(missing_ok=True)
            return


def _is_open(file: Path, opened: IO[str]) -> bool:
    """Whether a path leads to an open file."""
    try:
        return os.path.samestat(file.stat(), os.fstat(opened.fileno()))
    except FileNotFoundError:
        return False
