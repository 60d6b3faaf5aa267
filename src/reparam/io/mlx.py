"""Read the adapters of mlx-lm: `adapters.safetensors`, and an `adapter_config.json` without PEFT's keys.

A linear map has `<path>.lora_a` [I, R] and `<path>.lora_b` [R, O], the transposes of our A and B, and with DoRA the
magnitudes `<path>.m` [O]. An embedding has `lora_a` [V, R] and `lora_b` [R, I]. The scale of `lora_parameters` is the
whole scale. Only the last `num_layers` layers are adapted, or all if it is not above 0.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from reparam.core.base import Site
from reparam.core.checks import listed
from reparam.core.plain import decode
from reparam.errors import FormatError
from reparam.io.native import FLOATS, parse_tensors, read_bytes
from reparam.io.peft_weights import LARGEST
from reparam.io.record import Base, Claims, Record
from reparam.methods.dora import DoRA
from reparam.methods.lora import LoRA

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
_EMBEDDING = re.compile(r"(^|\.)(embed\w*|\w*embeddings?|wte|wpe)$")
_KEY = re.compile(r"(?P<path>.+)\.(?P<part>lora_a|lora_b|m)$")
_LAYER = re.compile(r"(?P<start>.*?\.)(?P<index>\d+)\.(?P<inside>.+)$")


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The keys of `lora_parameters` that count."""

    rank: int
    scale: float
    dropout: float = 0.0


@dataclasses.dataclass(frozen=True)
class _LastLayers(Claims):
    """The rule of `num_layers`: what one layer of the file has, all of the last layers must have."""

    first: int
    places: frozenset[tuple[str, str]]
    """What is before and after the number of the layer in the paths of the file."""

    def site(self, path: str) -> bool:
        found = _LAYER.match(path)
        return bool(found and int(found["index"]) >= self.first and (found["start"], found["inside"]) in self.places)

    def whole(self, path: str) -> bool:
        return False

    def ignored(self, path: str) -> bool:
        return False


def is_mlx(settings: Mapping[str, Any]) -> bool:
    """Whether an `adapter_config.json` is that of mlx-lm."""
    return "peft_type" not in settings and bool({"lora_parameters", "fine_tune_type", "lora_layers"} & settings.keys())


def read(folder: Path, settings: Mapping[str, Any]) -> Record:
    """Read the adapter in this folder. Raises FormatError for a file that is damaged or needs what we do not have."""
    config, file = folder / CONFIG, folder / WEIGHTS
    kind = settings.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise FormatError(f"{config}: fine_tune_type {kind!r} of mlx-lm is not supported, only 'lora' and 'dora' are")
    told = settings.get("lora_parameters")
    if not isinstance(told, dict):
        raise FormatError(f"{config}: lora_parameters: expected an object with rank, scale and dropout, found {told!r}")
    own = {key: value for key, value in told.items() if key in {field.name for field in dataclasses.fields(Parameters)}}
    parameters = decode(Parameters, own, f"{config}: lora_parameters")
    if "alpha" in told and told["alpha"] != told["rank"]:
        warnings.warn(
            f"{config}: has an alpha, which mlx-lm ignores since 2024; its first releases multiplied the scale by "
            f"alpha / rank: if the adapter is that old, multiply scale in the file by it",
            stacklevel=2,
        )
    if not file.exists() and (folder / "adapters.npz").exists():
        raise FormatError(f"{folder}: adapters.npz is of the first releases of mlx-lm; save it as {WEIGHTS} with mlx")
    raw = parse_tensors(read_bytes(file, most=LARGEST), file)
    sites, tensors = _sorted(raw, parameters.rank, kind == "dora", file)
    try:
        method = (DoRA if kind == "dora" else LoRA)(
            r=parameters.rank, alpha=parameters.scale, scaling="alpha", dropout=parameters.dropout
        )
    except ValueError as error:
        raise FormatError(f"{config}: lora_parameters: {error}") from None
    source = settings.get("model")
    base = Base("", source, {}) if isinstance(source, str) and source else None
    return Record(method, sites, tensors, base=base, claims=_claims(settings, sites, config))


def _sorted(raw: Mapping[str, Tensor], rank: int, dora: bool, file: Path) -> tuple[dict[str, Site], dict[str, Tensor]]:
    """The sites and our tensors. Raises FormatError that lists all problems."""
    found: dict[str, dict[str, Tensor]] = {}
    problems = []
    for key, tensor in raw.items():
        if match := _KEY.match(key):
            found.setdefault(match["path"], {})[match["part"]] = tensor
        elif key.endswith(("_scales", "_biases")):
            problems.append(f"{key}: quantized factors are not supported")
        else:
            problems.append(f"unknown tensor {key}")
    sites: dict[str, Site] = {}
    tensors: dict[str, Tensor] = {}
    inside = "low_rank." if dora else ""
    for path, parts in found.items():
        embedding = bool(_EMBEDDING.search(path))
        expected = {"lora_a", "lora_b", *(["m"] if dora else [])}
        if parts.keys() != expected:
            problems.append(f"{path}: expected {', '.join(sorted(expected))}, found {', '.join(sorted(parts))}")
            continue
        a, b = parts["lora_a"], parts["lora_b"]
        shapes = f"lora_a {list(a.shape)} and lora_b {list(b.shape)}"
        if a.ndim == 3 or b.ndim == 3:
            problems.append(f"{path}: {shapes} are factors of fused experts, which are not supported")
        elif embedding and dora:
            problems.append(f"{path}: DoRA on an embedding, whose norms mlx-lm computes otherwise, is not supported")
        elif a.ndim != 2 or b.ndim != 2 or a.shape[1] != rank or len(b) != rank or 0 in (*a.shape, *b.shape):
            problems.append(f"{path}: {shapes} do not have the rank {rank} of lora_parameters")
        elif any(tensor.dtype not in FLOATS for tensor in parts.values()):
            problems.append(f"{path}: expected floating-point factors, found {a.dtype} and {b.dtype}")
        elif dora and parts["m"].shape != (b.shape[1],):
            problems.append(f"{path}.m has shape {list(parts['m'].shape)}, expected {[b.shape[1]]}")
        else:
            ours = (b, a) if embedding else (a.t(), b.t())
            sites[path] = Site(path, "embedding" if embedding else "linear", len(ours[1]), ours[0].shape[1])
            tensors |= {f"{path}.{inside}A": ours[0], f"{path}.{inside}B": ours[1]}
            tensors |= {f"{path}.magnitude": parts["m"]} if dora else {}
    if problems:
        raise FormatError(f"{file}: {listed(problems)}")
    return sites, tensors


def _claims(settings: Mapping[str, Any], sites: Mapping[str, Site], config: Path) -> _LastLayers:
    """The rule of `num_layers`. Raises FormatError if the file has more layers than it states."""
    count = settings.get("num_layers", settings.get("lora_layers", -1))
    if not isinstance(count, int) or isinstance(count, bool):
        raise FormatError(f"{config}: num_layers: expected a whole number, found {count!r}")
    matches = [match for path in sites if (match := _LAYER.match(path))]
    layers = {int(match["index"]) for match in matches}
    if 0 < count < len(layers):
        raise FormatError(f"{config}: num_layers is {count}, but {WEIGHTS} has factors for {len(layers)} layers")
    first = max(0, max(layers, default=0) - count + 1) if count > 0 else 0
    return _LastLayers(first, frozenset((match["start"], match["inside"]) for match in matches))
