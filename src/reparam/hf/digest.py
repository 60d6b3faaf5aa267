"""A digest of the quantized tensors of a model, in the metadata of its safetensors files.

Most bytes of a quantized matrix are valid whatever they are, so only a digest shows that the files were damaged. Files
without one, such as those of earlier releases and of bitsandbytes, are read without this check.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from reparam.sites.expert import Expert

KEY = "reparam_digest"


def digest_of(parts: Mapping[str, Tensor]) -> str:
    """The digest of the tensors of one matrix, by their keys without the path of the module."""
    found = hashlib.sha256()
    for key, tensor in sorted(parts.items()):
        found.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def digest_of_all(digests: Mapping[str, str]) -> str:
    """The digest of a model from those of its quantized matrices, by path."""
    return hashlib.sha256("".join(f"{path} {digests[path]}\n" for path in sorted(digests)).encode()).hexdigest()


def digests_of(state: Mapping[str, Tensor], paths: Iterable[str]) -> dict[str, str]:
    """The digest of each quantized matrix in the state dict of a model."""
    parts: dict[str, dict[str, Tensor]] = {path: {} for path in paths}
    for key, tensor in state.items():
        path, found, rest = key.rpartition(".weight.")
        path, name = (path, f"weight.{rest}") if found else (key.removesuffix(".weight"), "weight")
        site = path.removesuffix(f".{Expert.packed_at[:-1]}")
        if site in parts and key == f"{path}.{name}":
            parts[site][name] = tensor
    return {path: digest_of(held) for path, held in parts.items()}


def told_digests(files: Iterable[str | Path]) -> set[str]:
    """The digests that the safetensors files of a model hold."""
    found = set()
    for file in files:
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                found |= {value for key, value in (opened.metadata() or {}).items() if key == KEY}
    return found


def order_metadata(folder: Path) -> None:
    """Write the metadata of the safetensors files of a folder in order, so that equal models are equal files.

    safetensors writes metadata of more than one entry in a random order.
    """
    for path in folder.glob("*.safetensors"):
        with path.open("r+b") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
            text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
            if len(text) <= size:  # the tensors stay where they are
                file.seek(8)
                file.write(text.ljust(size))
