"""Reparam's own adapter format: `adapter.safetensors` and `adapter.json` in one folder.

`adapter.json` holds the method with its settings, the sites, the base, the SHA-256 of the weights file, and a digest
of its own content. The two digests detect damage and edits of either file. They are not a signature: anyone can write
new files with valid digests. Therefore every value is checked before use, and nothing in the files is executed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

import reparam.methods  # noqa: F401  (importing it registers the methods)
from reparam.core.base import Kind, Site
from reparam.core.checks import listed
from reparam.core.memory import physical_memory
from reparam.core.method import Method
from reparam.core.plain import decode
from reparam.core.registry import find_method
from reparam.core.strict_json import loads
from reparam.errors import DuplicateKey, FormatError
from reparam.io.record import Base, Record, Tied
from reparam.io.steady import opened
from reparam.sites.kinds import KINDS
from reparam.sites.module import SHARED

WEIGHTS, CONFIG = "adapter.safetensors", "adapter.json"
FORMAT, VERSION = "reparam adapter", 1
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
LARGEST_JSON = 64 << 20
LARGEST = 16 << 30  # bytes of tensors, beside 8 for each entry of the weights that the adapter changes
POINTER = b"version https://git-lfs"  # the start of the text file that git has in place of a large one


@dataclasses.dataclass(frozen=True)
class SiteEntry:
    """A site as files describe it."""

    kind: Kind
    shape: tuple[int, int]
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class _Weights:
    file: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class _Config:
    """The keys of `adapter.json`, in the order in which they are written."""

    format: str
    version: int
    method: str
    settings: dict[str, Any]
    sites: dict[str, SiteEntry]
    replaced: list[str]
    base: Base | None
    weights: _Weights
    tied: dict[str, Tied] = dataclasses.field(default_factory=dict)
    digest: str = ""


def files(record: Record) -> dict[str, bytes]:
    """The contents of the two files, by file name."""
    weights = pack_tensors(record.tensors)
    config = _Config(
        format=FORMAT,
        version=VERSION,
        method=record.method.name,
        settings=record.method.settings(),
        sites=site_entries(record),
        replaced=list(record.replaced),
        base=record.base,
        weights=_Weights(WEIGHTS, hashlib.sha256(weights).hexdigest()),
        tied=record.tied,
    )
    values = dataclasses.asdict(config)
    if not record.tied:  # earlier releases refuse this key
        del values["tied"]
    if record.base is not None and not record.base.packing:  # earlier releases refuse this key, so dense bases omit it
        del values["base"]["packing"]
    values["digest"] = _digest(values)
    return {WEIGHTS: weights, CONFIG: (json.dumps(values, indent=1) + "\n").encode()}


def read(folder: Path) -> Record:
    """Read the adapter in `folder`. Raises FormatError if a file is missing, edited, truncated or not finite."""
    file = folder / CONFIG
    values = read_json(file)
    if values.get("format") != FORMAT or values.get("version") != VERSION:
        raise FormatError(
            f"{file}: expected format {FORMAT!r} version {VERSION}, found {values.get('format')!r} version "
            f"{values.get('version')!r}; a later release of reparam may read it"
        )
    if values.get("digest") != _digest(values):
        raise FormatError(
            f"{file}: the digest does not match the content, so the file was edited or damaged; restore it, or change "
            f"the setting in Python and save the adapter again"
        )
    config = decode(_Config, values, file)
    if config.weights.file != WEIGHTS:  # never follow a path from a file
        raise FormatError(f"{file}: weights.file: expected {WEIGHTS!r}, found {config.weights.file!r}")
    sizes = sum(math.prod(site.shape) for site in config.sites.values())
    weights = read_bytes(folder / WEIGHTS, most=LARGEST + 8 * sizes)
    if hashlib.sha256(weights).hexdigest() != config.weights.sha256:
        raise FormatError(
            f"{folder / WEIGHTS}: the SHA-256 differs from the one in {CONFIG}; the file was truncated or damaged, or "
            f"belongs to another adapter"
        )
    record = Record(
        method=method_of(config.method, config.settings, file),
        sites={n: Site(n, s.kind, *s.shape, transposed=s.transposed) for n, s in config.sites.items()},
        tensors=parse_tensors(weights, folder / WEIGHTS),
        replaced=tuple(config.replaced),
        base=config.base,
        tied=config.tied,
    )
    check_whole(record, folder)
    return record


def site_entries(record: Record) -> dict[str, SiteEntry]:
    """The sites of an adapter as files describe them."""
    return {n: SiteEntry(s.kind, (s.out_features, s.in_features), s.transposed) for n, s in record.sites.items()}


def method_of(name: str, settings: dict[str, Any], file: object) -> Method:
    """The method with these settings. Raises FormatError, with the file, for an unknown name or a bad setting."""
    try:
        return decode(find_method(name), settings, f"{file}: settings")
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(f"{file}: {error}") from None


def check_whole(record: Record, folder: Path) -> None:
    """Raise FormatError unless the sites are possible and every tensor belongs to a site or a replaced module."""
    kinds = ", ".join(repr(kind) for kind in KINDS)
    problems = [
        f"{CONFIG}: sites[{name!r}].kind: expected one of {kinds}, found {site.kind!r}"
        for name, site in record.sites.items()
        if site.kind not in KINDS
    ]
    problems += [
        f"{CONFIG}: sites[{name!r}]: expected sizes of at least 1, found {site.out_features} x {site.in_features}"
        for name, site in record.sites.items()
        if min(site.out_features, site.in_features) < 1
    ]
    owners = [*record.sites, *record.replaced, *record.tied]
    if len(set(owners)) < len(owners) or "" in owners:
        problems.append(f"{CONFIG}: 'sites', 'replaced' and 'tied' name a module twice, or the model itself")
    problems += [
        f"{CONFIG}: tied[{name!r}].to: expected the path of a site, found {tie.to!r}"
        for name, tie in record.tied.items()
        if tie.to not in record.sites
    ]
    owned = (*(f"{name}." for name in owners), f"{SHARED}.")
    problems += [
        f"{WEIGHTS}: unknown tensor {key}, which belongs to no site or module of {CONFIG}"
        for key in record.tensors
        if not key.startswith(owned)
    ]
    if problems:
        raise FormatError(f"{folder}: {listed(problems)}")


def read_bytes(file: Path, *, most: int | None = None) -> bytes:
    """Read a file.

    Raises FormatError if it is missing, unreadable, empty, larger than `most` bytes or than the machine's memory, not a
    regular file, or a pointer of git-LFS; and if it is a safetensors file of another size than its header states. These
    are checked first.
    """
    with opened(file) as found:
        _check_size(file, found, most)
        content = found.read()
    if not content:
        raise FormatError(f"{file}: the file is empty")
    return content


def _check_size(file: Path, found: BinaryIO, most: int | None) -> None:
    size = os.fstat(found.fileno()).st_size
    if found.read(len(POINTER)) == POINTER:
        raise FormatError(f"{file}: a pointer of git-LFS, not the file itself; run git lfs pull in its folder")
    if most is not None and size > most:
        raise FormatError(f"{file}: {size:,} bytes, more than the {most:,} that such a file can have")
    memory = physical_memory()
    if memory is not None and size > memory:
        raise FormatError(f"{file}: {size:,} bytes, more than the memory of this machine ({memory:,} bytes)")
    found.seek(0)
    if file.suffix != ".safetensors" or not size:
        return
    length = int.from_bytes(found.read(8), "little")
    try:
        if length > min(size - 8, LARGEST_JSON):
            raise ValueError(f"its header claims {length:,} bytes")
        header = loads(found.read(length))
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        if 8 + length + max(ends, default=0) != size:
            raise ValueError(f"its header states {8 + length + max(ends, default=0):,} bytes, the file has {size:,}")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{file}: not a complete safetensors file ({error})") from None
    found.seek(0)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises FormatError if the content is not one, or has a key twice."""
    try:
        found = loads(read_bytes(file, most=LARGEST_JSON))
    except FormatError:
        raise
    except DuplicateKey as error:
        raise FormatError(f"{file}: {error}") from None
    except ValueError as error:
        raise FormatError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise FormatError(f"{file}: expected a JSON object, found {type(found).__name__}")
    return found


def pack_tensors(tensors: Mapping[str, Tensor], *, metadata: dict[str, str] | None = None) -> bytes:
    """Serialize tensors as a safetensors file. Tensors that share memory are copied, because the format forbids it."""
    seen: set[int] = set()
    plain = {}
    for key, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        plain[key] = value.clone() if value.untyped_storage().data_ptr() in seen else value
        seen.add(value.untyped_storage().data_ptr())
    return save_tensors(plain, metadata=metadata)


def parse_tensors(content: bytes, file: Path) -> dict[str, Tensor]:
    """Parse a safetensors file.

    Raises FormatError if it is damaged or empty, or if a tensor has an unsupported dtype, NaN or infinity.
    """
    try:
        tensors = load_tensors(content)
    except Exception as error:  # the library does not document what it raises for invalid bytes
        raise FormatError(f"{file}: not a complete safetensors file ({error})") from None
    return checked(tensors, file)


def checked(tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The tensors. Raises FormatError if there are none, and for dtypes that no adapter has, NaN and infinity."""
    if not tensors:
        raise FormatError(f"{file}: holds no tensors")
    odd = [f"{key} is {value.dtype}" for key, value in tensors.items() if value.dtype not in (*FLOATS, *WHOLE)]
    if odd:
        raise FormatError(f"{file}: unsupported dtypes: {listed(odd)}")
    bad = [key for key, value in tensors.items() if value.dtype in FLOATS and not torch.isfinite(value).all()]
    if bad:
        raise FormatError(f"{file}: NaN or infinity in {listed(bad)}")
    return tensors


def _digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of the configuration without its digest. The order of keys counts, because the first pattern wins."""
    rest = {key: value for key, value in config.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, separators=(",", ":")).encode()).hexdigest()
