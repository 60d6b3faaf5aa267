"""PEFT's format, both ways: `adapter_model.safetensors` and `adapter_config.json` (as PEFT 0.21 writes them).

Each method that PEFT has an equal of is one file, `peft_<method>.py` (see `peft_formats.py`). Nothing is folded into
the factors: the scale stays in the configuration. What a file asks for beyond that is refused by name, never dropped
(`peft_config.py`).

The format binds nothing: an edited lora_alpha, or weights of another training run with the same shapes, load without a
complaint, and the base is named but not digested. Only what contradicts itself, or the model, can be refused.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path

from torch import Tensor

import reparam.io
from reparam.io.native import pack_tensors, read_json
from reparam.io.peft_formats import CONFIG, PREFIX, WEIGHTS, Folder, reader_of, writer_of
from reparam.io.record import Record

__all__ = ["CONFIG", "WEIGHTS", "files", "read"]

for _file in pkgutil.iter_modules(reparam.io.__path__):
    if _file.name.startswith("peft_"):
        importlib.import_module(f"reparam.io.{_file.name}")


def read(folder: Path) -> Record:
    """The adapter that PEFT saved in `folder`. Raises FormatError, naming the key, for what cannot be honored."""
    found = Folder(folder, read_json(folder / CONFIG))
    return reader_of(found).read(found)


def files(record: Record) -> dict[str, bytes]:
    """The two files' contents by name. Raises FormatError for what PEFT has no equal of."""
    method = record.method
    writer = writer_of(method)
    writer.check(method, record)
    config = writer.settings(method, record)
    tensors: dict[str, Tensor] = {}
    for name, site in record.sites.items():
        tensors |= {f"{PREFIX}{name}{end}": tensor for end, tensor in writer.tensors(name, site, record).items()}
        if f"{name}.bias" in record.tensors:
            tensors[f"{PREFIX}{name}.base_layer.bias"] = record.tensors[f"{name}.bias"]
    for module in record.replaced:
        tensors |= {PREFIX + key: t for key, t in record.tensors.items() if key.startswith(module + ".")}
    weights = pack_tensors(tensors, metadata={"format": "pt"})
    return {WEIGHTS: weights, CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}
