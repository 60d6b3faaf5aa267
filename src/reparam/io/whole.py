"""Adapters in the files of a whole model, as `model.save_pretrained` and the checkpoints of a Trainer write them.

The base's tensors have their usual names there, so that stock tools read the base. The adapters' tensors have those of
the modules that hold them (`<site>.updates.<name>.<parameter>`), and `ENTRY` is JSON in uint8: each adapter's method
with its settings, its sites, and the modules that it replaces. There are no digests: an adapter that is to be passed on
is written by `adapter.save`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reparam.core.base import Site
from reparam.core.plain import decode
from reparam.core.strict_json import loads
from reparam.errors import FormatError
from reparam.io import native
from reparam.io.record import Record, Tied
from reparam.sites.wrapped import bare_key

ENTRY = "reparam.adapters"
"""The key of the JSON among the tensors of the model."""
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
UPDATES, BIASES, SHARED = "updates", "biases", native.SHARED
LARGEST = 64 << 20
"""Bytes that the JSON may have at most."""


@dataclasses.dataclass(frozen=True)
class _Entry:
    """What `ENTRY` says of one adapter."""

    method: str
    settings: dict[str, Any]
    sites: dict[str, native.SiteEntry]
    replaced: list[str]
    tied: dict[str, Tied] = dataclasses.field(default_factory=dict)


def entry(records: Mapping[str, Record]) -> Tensor:
    """The tensor for `ENTRY`, uint8 [bytes of JSON]."""
    found = {
        name: _Entry(
            record.method.name,
            record.method.settings(),
            native.site_entries(record),
            list(record.replaced),
            record.tied,
        )
        for name, record in records.items()
    }
    text = json.dumps({name: dataclasses.asdict(values) for name, values in found.items()})
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def has_adapters(folder: Path) -> bool:
    """Whether the model in this folder was saved with adapters on it."""
    try:
        return any(ENTRY in keys for _, keys in _files(folder))
    except FormatError:
        return False


def read(folder: Path, name: str | None = None) -> Record:
    """The adapter in the files of a whole model; `name` chooses where there are several.

    Raises FormatError if there is none, if there are several and none has this name, and for damaged files.
    """
    files = dict(_files(folder))
    place = next((file for file, keys in files.items() if ENTRY in keys), None)
    if place is None:
        raise FormatError(f"{folder}: the model in this folder was saved without adapters")
    entries = _entries(place, files[place][ENTRY])
    chosen = name if name in entries or len(entries) != 1 else next(iter(entries))
    if chosen is None or chosen not in entries:
        raise FormatError(
            f"{folder}: the model in this folder has {len(entries)} adapters; give the name of one of them: "
            f"{', '.join(entries)}"
        )
    where = f"{place}: {ENTRY}[{chosen!r}]"
    found = decode(_Entry, entries[chosen], where)
    tensors: dict[str, Tensor] = {}
    for file, keys in files.items():
        wanted = {key: own for bare, key in keys.items() if (own := _own(bare, chosen, found))}
        if twice := tensors.keys() & wanted.values():
            raise FormatError(f"{file}: has {min(twice)}, which another file of the model has, too")
        tensors |= {wanted[key]: value for key, value in _tensors(file, list(wanted)).items()}
    record = Record(
        method=native.method_of(found.method, found.settings, where),
        sites={path: Site(path, s.kind, *s.shape, transposed=s.transposed) for path, s in found.sites.items()},
        tensors=native.checked(tensors, place),
        replaced=tuple(found.replaced),
        tied=found.tied,
    )
    native.check_whole(record, folder)
    return record


def _own(key: str, name: str, found: _Entry) -> str | None:
    """The name of this tensor in an adapter's files; None for a tensor of the base or of another adapter."""
    if key.startswith(f"{SHARED}.{name}."):
        return f"{SHARED}.{key.removeprefix(f'{SHARED}.{name}.')}"
    path, between, rest = key.partition(f".{UPDATES}.{name}.")
    if between and (path in found.sites or path in found.replaced):
        return f"{path}.{rest}"
    path, between, rest = key.rpartition(f".{BIASES}.{name}")
    return f"{path}.bias" if between and not rest and (path in found.sites or path in found.tied) else None


def _entries(file: Path, key: str) -> dict[str, Any]:
    """The JSON of the adapters in this file. Its size is checked before it is read."""
    with _opened(file) as opened:
        shape = opened.get_slice(key).get_shape()
        if math.prod(shape) > LARGEST:
            raise FormatError(f"{file}: {ENTRY} is {shape}, expected at most {LARGEST:,} bytes")
        tensor = opened.get_tensor(key)
    if tensor.dtype is not torch.uint8 or tensor.ndim != 1:
        raise FormatError(f"{file}: {ENTRY} is {tensor.dtype} {list(tensor.shape)}, expected a row of uint8")
    try:
        found = loads(bytes(tensor.tolist()))
    except ValueError as error:
        raise FormatError(f"{file}: {ENTRY} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise FormatError(f"{file}: {ENTRY}: expected a JSON object, found {type(found).__name__}")
    return found


def _files(folder: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """The weight files of the model, and the names of the tensors in each: bare ones, and those in the file.

    A model that is wrapped, whole or in parts (compiled, FSDP1, DDP), has the names of the wrappers in its files.
    """
    names = [SINGLE]
    if (folder / INDEX).is_file():
        shards = native.read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or any(Path(str(name)).name != name for name in shards.values()):
            raise FormatError(f"{folder / INDEX}: weight_map: expected names of files in this folder")
        names = sorted(set(shards.values()))
    found: dict[Path, dict[str, str]] = {}
    for file in (folder / name for name in names):
        if file.is_file():
            with _opened(file) as opened:
                keys = list(opened.keys())
            found[file] = {bare_key(key): key for key in keys}
            if len(found[file]) < len(keys):
                raise FormatError(f"{file}: has a tensor twice, with and without the names of wrappers in its key")
    start = "module." if any(f"module.{ENTRY}" in keys for keys in found.values()) else ""
    for file, own in found.items():
        yield file, {bare.removeprefix(start): key for bare, key in own.items()}


def _tensors(file: Path, keys: list[str]) -> dict[str, Tensor]:
    with _opened(file) as opened:
        return {key: opened.get_tensor(key) for key in keys}


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{file}: not a whole safetensors file, or cannot be read ({error})") from None
