"""Use a GGUF file as a base: convert it once to a stock folder, which is kept in a cache, and load that.

transformers can read GGUF, but reads the metadata three times and holds the whole model in float32, each time. Here one
tensor at a time is dequantized and written, so the conversion needs memory for one shard, and later loads are those of
any folder: quantizing while reading works, and so does everything that wants files.

The names and orders of tensors, the configuration and the tokenizer come from transformers' own GGUF reader.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import importlib.util
import json
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from reparam.core.progress import waiting
from reparam.data.files.reach import unreachable
from reparam.errors import BaseError
from reparam.hf.folder import is_gguf
from reparam.io.outputs import user_cache
from reparam.io.staged import digest, staged_folder, write_file

SHARD = 2 << 30  # bytes of one file of weights
_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)/(?P<file>.+\.gguf)$")
_SHA = re.compile(rb"[0-9a-f]{64}")
_DTYPES = ("float32", "bfloat16", "float16")
_MOST = 1 << 20  # tensors, and entries of metadata


def folder_of(path: str, *, dtype: str = "auto", revision: str | None = None) -> str:
    """The folder to load for this path: the path itself, or for a GGUF file the folder that it was converted to.

    Args:
        path: a folder, a hub id, a GGUF file, or `owner/name/FILE.gguf` on the hub.
        dtype: dtype of the converted weights; "auto" is float32, which keeps the dequantized numbers exactly.
        revision: branch, tag or commit on the hub.

    Raises BaseError if the file does not exist, is no GGUF file, holds a model that transformers cannot read from GGUF,
    or if the package gguf is missing; and OSError if the cache cannot be written.
    """
    if not is_gguf(path):
        return path
    file, name = _found(path, revision)
    kept = "float32" if dtype == "auto" else dtype
    place = user_cache("gguf") / f"{name}-{kept}"
    if not place.exists():
        _convert(path, file, place, getattr(torch, kept))
    return str(place)


def tokenizer_folder_of(path: str, *, revision: str | None = None) -> str:
    """The folder to load the tokenizer from: as `folder_of`, but without converting the weights. Same errors."""
    if not is_gguf(path):
        return path
    file, name = _found(path, revision)
    if not (place := user_cache("gguf") / f"{name}-tokenizer").exists():
        with waiting(f"reading the tokenizer of {path}"):
            settings = {"gguf_file": file.name, "trust_remote_code": False}
            config = AutoConfig.from_pretrained(file.parent, **settings)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **settings)
        place.parent.mkdir(parents=True, exist_ok=True)
        with staged_folder(place, owned=True) as staging:
            config.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
    return str(place)


def converted(path: str) -> str | None:
    """A folder with the weights of this GGUF file, in any dtype; None if it was not converted yet."""
    _, name = _found(path, None)
    return next(
        (
            str(user_cache("gguf") / f"{name}-{end}")
            for end in _DTYPES
            if (user_cache("gguf") / f"{name}-{end}").exists()
        ),
        None,
    )


def _found(path: str, revision: str | None) -> tuple[Path, str]:
    """The file, and how the names of its folders in the cache begin."""
    file = _local(path, revision)
    _check(path, file)
    stat = file.stat()
    minor = ".".join(transformers.__version__.split(".")[:2])
    return file, f"{_digest(str(file.resolve()), stat.st_size, stat.st_mtime_ns)[:32]}-{minor}"


@functools.lru_cache
def _digest(file: str, size: int, changed: int) -> str:
    """The SHA-256 of the file; `size` and `changed` tell when it is another file.

    It is kept in the cache, because reading a large file takes as long as loading a model.
    """
    key = hashlib.sha256(f"{file}\0{size}\0{changed}".encode()).hexdigest()[:32]
    kept = user_cache("digests") / key
    if not kept.is_file() or not _SHA.fullmatch(kept.read_bytes()):
        write_file(kept, digest(file).encode())
    return kept.read_text()


def _local(path: str, revision: str | None) -> Path:
    """The file on disk; one on the hub is downloaded into the hub's cache."""
    if os.path.exists(path) or not (match := _HUB.match(path)) or path.startswith((".", "/", "~")):
        return Path(path)
    from huggingface_hub import hf_hub_download

    try:
        cached = bool(unreachable())
        return Path(hf_hub_download(match["repo"], match["file"], revision=revision, local_files_only=cached))
    except Exception as error:  # of the network, of the hub, of a wrong name
        told = str(error).partition("\n")[0]
        raise BaseError(f"{path}: no such file here, and it could not be downloaded from the hub: {told}") from None


def _check(path: str, file: Path) -> None:
    """Raise BaseError unless this is a file with the header of GGUF."""
    if not file.exists():
        raise BaseError(f"{path}: no such file")
    if not file.is_file():
        raise BaseError(f"{path}: is not a regular file")
    with open(file, "rb") as opened:
        head = opened.read(24)
    if head.startswith(b"version https://git-lfs"):
        raise BaseError(f"{path}: is a pointer of git-LFS, not the file itself; run  git lfs pull")
    if head[:4] != b"GGUF" or len(head) < 24:
        raise BaseError(f"{path}: is no GGUF file: it does not begin with GGUF")
    version, tensors, entries = struct.unpack("<IQQ", head[4:])
    if version not in (2, 3) or max(tensors, entries) > _MOST:
        raise BaseError(f"{path}: GGUF of version {version} with {tensors:,} tensors cannot be read; expected 2 or 3")
    if importlib.util.find_spec("gguf") is None:
        raise BaseError(f"{path}: GGUF files need the package gguf: run  pip install 'reparam[gguf]'")


def _convert(path: str, file: Path, place: Path, dtype: torch.dtype) -> None:
    """Write the stock folder of this file, whole or not at all."""
    from gguf import GGUFReader

    with waiting(f"reading {path}"):
        reader = GGUFReader(file)
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    kinds = collections.Counter(tensor.tensor_type.name for tensor in reader.tensors)
    names = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    place.parent.mkdir(parents=True, exist_ok=True)
    label = f"dequantizing {path} ({names} tensors) into {place}"
    with waiting(label, len(reader.tensors), unit="tensors") as advance, staged_folder(place, owned=True) as staging:
        writer = _Shards(staging)
        for name, tensor in _tensors(reader, model, config, advance):
            writer.add(name, tensor.to(dtype))
        missing = {key for key in _own(model) if key not in writer.written}
        if missing:
            raise BaseError(f"{path}: lacks {len(missing)} tensors of a {type(model).__name__}, such as {min(missing)}")
        writer.finish()
        config.save_pretrained(staging)


def _own(model: nn.Module) -> set[str]:
    """The keys of the model's weights, without those of tied copies."""
    return set(model.state_dict()) - set(getattr(model, "all_tied_weights_keys", None) or {})


def _tensors(reader: Any, model: Any, config: Any, advance: Any) -> Iterator[tuple[str, Tensor]]:
    """The dequantized tensors under transformers' names, in transformers' order, one at a time.

    Experts that GGUF holds in several tensors are complete after the last one, so they come at the end.
    """
    from gguf import dequantize
    from transformers import modeling_gguf_pytorch_utils as stock

    architecture = str(reader.fields["general.architecture"].contents())
    processor = stock.TENSOR_PROCESSORS.get(architecture, stock.TensorProcessor)(config=config.to_dict())
    keys = stock.get_gguf_hf_weights_map(_Flat(model), processor)
    if not set(keys.values()) >= _own(model):
        keys = stock.get_gguf_hf_weights_map(model, processor)
    joined: dict[str, Any] = {"tensors": {}}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        found = processor.process(weights=values, name=tensor.name, tensor_key_mapping=keys, parsed_parameters=joined)
        if found.name in keys:
            yield keys[found.name], torch.from_numpy(found.weights.copy())
        advance(1)
    yield from joined["tensors"].items()


class _Flat:
    """A model without children, for which transformers makes the table of names once, not once for each module."""

    def __init__(self, model: Any) -> None:
        self.config = model.config
        self._model = model

    def state_dict(self) -> dict[str, Tensor]:
        return self._model.state_dict()

    def named_children(self) -> list[Any]:
        return []


class _Shards:
    """Writes tensors to files of at most `SHARD` bytes, and their index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: dict[str, int] = {}
        self._held: dict[str, Tensor] = {}
        self._count = 0

    def add(self, name: str, tensor: Tensor) -> None:
        held = sum(t.numel() * t.element_size() for t in self._held.values())
        if self._held and held + tensor.numel() * tensor.element_size() > SHARD:
            self._flush()
        self._held[name] = tensor.contiguous()
        self.written[name] = self._count

    def finish(self) -> None:
        self._flush()
        files = [f"model-{i + 1:05}-of-{self._count:05}.safetensors" for i in range(self._count)]
        for index, name in enumerate(files):
            os.rename(self.folder / f"{index}.part", self.folder / name)
        total = sum((self.folder / name).stat().st_size for name in files)
        table = {"metadata": {"total_size": total}, "weight_map": {k: files[i] for k, i in self.written.items()}}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")

    def _flush(self) -> None:
        if self._held:
            save_file(self._held, self.folder / f"{self._count}.part", metadata={"format": "pt"})
            self._held, self._count = {}, self._count + 1
