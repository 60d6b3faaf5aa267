"""The project's own format: `adapter.safetensors` and `adapter.json` in one folder.

`adapter.json` holds the method with its settings, the sites, the base, the SHA-256 of the weights file, and a digest
of itself, so that neither file can change without the other. The folder is staged, fsynced and put in place at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from reparam.base import Site, find_method
from reparam.io.record import Base, FormatError, Record

WEIGHTS, CONFIG = "adapter.safetensors", "adapter.json"
VERSION = 1


def files(record: Record) -> dict[str, bytes]:
    """The two files' contents by name."""
    weights = save_tensors({key: tensor.detach().cpu().contiguous() for key, tensor in record.tensors.items()})
    config: dict[str, Any] = {
        "format": "reparam adapter",
        "version": VERSION,
        "method": record.method.name,
        "settings": record.method.settings(),
        "sites": {
            name: {"kind": site.kind, "shape": [site.out_features, site.in_features]}
            for name, site in record.sites.items()
        },
        "replaced": list(record.replaced),
        "base": dataclasses.asdict(record.base) if record.base else None,
        "weights": {"file": WEIGHTS, "sha256": hashlib.sha256(weights).hexdigest()},
    }
    config["digest"] = _digest(config)
    return {WEIGHTS: weights, CONFIG: (json.dumps(config, indent=1) + "\n").encode()}


def read(folder: Path) -> Record:
    """The adapter in `folder`. Raises FormatError for anything missing, edited, cut short or not finite."""
    config = read_json(folder / CONFIG)
    if config.get("format") != "reparam adapter" or config.get("version") != VERSION:
        raise FormatError(
            f"{folder / CONFIG}: format {config.get('format')!r} version {config.get('version')!r}; this release reads "
            f"'reparam adapter' version {VERSION}"
        )
    if config.get("digest") != _digest(config):
        raise FormatError(
            f"{folder / CONFIG}: its digest does not fit its content, so it was edited or damaged; restore the file, "
            f"or change the setting in Python and save the adapter again"
        )
    weights = read_bytes(folder / WEIGHTS)
    if hashlib.sha256(weights).hexdigest() != config["weights"]["sha256"]:
        raise FormatError(
            f"{folder / WEIGHTS}: not the file that {CONFIG} was written with (SHA-256 differs); it was cut short, "
            f"damaged or comes from another save"
        )
    base = config["base"]
    return Record(
        method=find_method(config["method"])(**config["settings"]),
        sites={n: Site(n, s["kind"], *s["shape"]) for n, s in config["sites"].items()},
        tensors=parse_tensors(weights, folder / WEIGHTS),
        replaced=tuple(config["replaced"]),
        base=Base(**base) if base else None,
    )


def read_bytes(file: Path) -> bytes:
    """The content of a file that must be there and not be empty."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise FormatError(f"{file}: no such file; the adapter is incomplete") from None
    if not content:
        raise FormatError(f"{file}: the file is empty")
    return content


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        found = json.loads(read_bytes(file))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise FormatError(f"{file}: expected a JSON object, found {type(found).__name__}")
    return found


def parse_tensors(content: bytes, file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises FormatError for none, a damaged file, NaN or infinity."""
    try:
        tensors = load_tensors(content)
    except SafetensorError as error:
        raise FormatError(f"{file}: not a whole safetensors file ({error})") from None
    if not tensors:
        raise FormatError(f"{file}: holds no tensors, so it would change nothing")
    bad = [key for key, value in tensors.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if bad:
        raise FormatError(f"{file}: NaN or infinity in {', '.join(bad[:5])}{' and more' if len(bad) > 5 else ''}")
    return tensors


def _digest(config: dict[str, Any]) -> str:
    rest = {key: value for key, value in config.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
