"""Read and write PEFT's format: `adapter_model.safetensors` and `adapter_config.json`, as of PEFT 0.21.

Each method with a PEFT equivalent has one module, `peft_<method>.py` (see `peft_formats.py`). The scale stays in the
configuration and is not multiplied into the factors. Unsupported settings are refused by name and never ignored
(`peft_config.py`).

The format has no checksums: it cannot detect an edited lora_alpha or the weights of another run with the same shapes,
and it names the base without a fingerprint. Only contradictions within the files or with the model are detected.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

import reparam.io
from reparam.io import mlx, peft_experts
from reparam.io.head import PEFT_TYPES, Head
from reparam.io.native import pack_tensors, read_json
from reparam.io.peft_formats import CONFIG, PREFIX, Folder, reader_of, writer_of
from reparam.io.peft_weights import WEIGHTS
from reparam.io.record import Record

HEADS = ("score", "classifier", "classification_head")  # how transformers names the heads of classifiers
__all__ = ["CONFIG", "WEIGHTS", "files", "read"]

for _file in pkgutil.iter_modules(reparam.io.__path__):
    if _file.name.startswith("peft_"):
        importlib.import_module(f"reparam.io.{_file.name}")


def read(folder: Path) -> Record:
    """Read the adapter that PEFT or mlx-lm saved in `folder`. Raises FormatError that names each unsupported key."""
    settings = read_json(folder / CONFIG)
    if mlx.is_mlx(settings):
        return mlx.read(folder, settings)
    found = Folder(folder, settings)
    record = reader_of(found).read(found)
    return dataclasses.replace(record, head=_head(settings, record))


def _head(settings: Mapping[str, Any], record: Record) -> Head | None:
    """The task that the settings name. The saved head tells the number of classes; PEFT does not keep their names."""
    task = PEFT_TYPES.get(str(settings.get("task_type")))
    if task is None or task == "causal":
        return None
    ends = (".weight", ".out_proj.weight")
    sizes = [
        len(record.tensors[f"{path}{end}"])
        for path in record.replaced
        for end in ends
        if path.rpartition(".")[2] in HEADS and f"{path}{end}" in record.tensors
    ]
    if task not in ("classification", "token-classification") or not sizes:
        return Head(task)
    number = task == "classification" and sizes[0] == 1
    return Head(task, () if number else tuple(f"LABEL_{i}" for i in range(sizes[0])), regression=number)


def files(record: Record) -> dict[str, bytes]:
    """The contents of the two files, by file name. Raises FormatError if PEFT has no equivalent of the adapter."""
    method = record.method
    writer = writer_of(method)
    writer.check(method, record)
    whole = record.apart()
    record = peft_experts.without_experts(whole)
    config = writer.settings(method, record)
    if record.head is not None:
        config["task_type"] = record.head.peft_type
    tensors: dict[str, Tensor] = {}
    if writer.experts:
        stacked = peft_experts.add(config, whole, method)
        tensors = {f"{PREFIX}{key}": tensor for key, tensor in stacked.items()}
    for name, site in record.sites.items():
        found = writer.tensors(name, site, record)
        tensors |= {f"{PREFIX}{name}{end}": tensor for end, tensor in found.items()}
        if f"{name}.bias" in record.tensors:
            inside = ".base_layer" if found or name in record.tied else ""  # PEFT wraps a module that has factors
            tensors[f"{PREFIX}{name}{inside}.bias"] = record.tensors[f"{name}.bias"]
    for module in record.replaced:
        tensors |= {PREFIX + key: t for key, t in record.tensors.items() if key.startswith(module + ".")}
    weights = pack_tensors(tensors, metadata={"format": "pt"})
    return {WEIGHTS: weights, CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}
