"""Write an adapter as mlx-lm reads it: `adapters.safetensors` and `adapter_config.json`.

A linear map has `lora_a` [I, R] and `lora_b` [R, O]. mlx-lm's DoRA computes, with the magnitudes m [O],

    W' = m · (W + b a) / |W + b a|    by rows,    so that gain = m / |W + b a|  and  B A = gain · b a

Every change with a gain is therefore written exactly: b is B divided by the gain, and m the gain times the norms. The
scale is 1. mlx-lm adapts the same modules in each of the last `num_layers` layers; a map without a change gets zeros.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from reparam.adapter.adapter import Adapter
from reparam.core.base import Factors
from reparam.core.checks import listed
from reparam.errors import ExportError
from reparam.export.changes import Change, check_linear, filled
from reparam.io.mlx import CONFIG, WEIGHTS
from reparam.io.native import pack_tensors
from reparam.io.staged import staged_folder

PROGRAM = "mlx-lm"
_LAYER = re.compile(r"(?P<start>.*?\blayers\.)(?P<index>\d+)\.(?P<inside>.+)$")


@torch.no_grad()
def with_gains(adapter: Adapter) -> dict[str, Factors] | None:
    """The factors and gains of an adapter with gains, in float64, as DoRA of mlx-lm has them; None without gains.

    Raises ExportError if a gain is zero, which mlx-lm cannot express.
    """
    check_linear(adapter, PROGRAM)
    found = {path: update.factors(adapter.modules[path].frozen) for path, update in adapter.updates.items()}
    if all(factors.gain is None for factors in found.values()):
        return None
    if zero := [path for path, factors in found.items() if factors.gain is not None and not factors.gain.all()]:
        raise ExportError(
            f"{listed(zero)}: a row has the gain 0, which mlx-lm cannot express; pass --merged to write a merged model"
        )
    return {path: Factors(*(None if t is None else t.double() for t in f)) for path, f in found.items()}  # type: ignore[arg-type]


@torch.no_grad()
def write(folder: Path, adapter: Adapter, changes: Mapping[str, Change] | None, rank: int) -> None:
    """Write the two files, in float32: DoRA if `changes` is None, else LoRA with factors of this rank.

    Raises ExportError if the modules are not those of numbered layers, or if they cannot be written as DoRA.
    """
    tensors: dict[str, Tensor] = {}
    if changes is None:
        for path, factors in (with_gains(adapter) or {}).items():
            gain = torch.ones(len(factors.B), dtype=torch.float64) if factors.gain is None else factors.gain
            factors = filled(factors.A, factors.B / gain[:, None], rank)
            tensors |= _pair(path, factors)
            direction = adapter.modules[path].frozen.dense().double() + factors.B @ factors.A
            tensors[f"{path}.m"] = (gain * direction.norm(dim=1)).float()
    else:
        for path, change in changes.items():
            tensors |= _pair(path, change.at(rank))
    keys, count = _places({key.rpartition(".")[0] for key in tensors}, adapter)
    tensors |= _zeros(tensors, keys, count, adapter, rank, dora=changes is None)
    config = {
        "fine_tune_type": "dora" if changes is None else "lora",
        "num_layers": count,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
        "model": str(getattr(adapter.model.config, "_name_or_path", "")),
    }
    with staged_folder(folder, owned=True) as staging:
        (staging / WEIGHTS).write_bytes(pack_tensors(tensors, metadata={"format": "mlx"}))
        (staging / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def next_step(folder: Path, base: str, rank: int) -> str:
    """The command that uses it."""
    return f"mlx_lm.generate --model {base} --adapter-path {folder}"


def _pair(path: str, factors: Factors) -> dict[str, Tensor]:
    return {
        f"{path}.lora_a": factors.A.float().t().contiguous(),
        f"{path}.lora_b": factors.B.float().t().contiguous(),
    }


def _layers(adapter: Adapter) -> tuple[str, int]:
    """What is before the numbers of the layers, and how many layers there are."""
    count = getattr(getattr(adapter.model, "config", None), "num_hidden_layers", None)
    starts = {match["start"] for path in adapter.modules if (match := _LAYER.match(path))}
    if len(starts) != 1 or count is None:
        raise ExportError(
            "mlx-lm needs a model with one list of numbered layers, such as model.layers.0; the modules of this "
            "adapter are not in one"
        )
    return starts.pop(), int(count)


def _places(paths: set[str], adapter: Adapter) -> tuple[set[str], int]:
    """The `keys` of the configuration, and the number of last layers that have them."""
    _, count = _layers(adapter)
    matches = [(path, _LAYER.match(path)) for path in paths]
    keys = {match["inside"] if match else path for path, match in matches}
    first = min((int(match["index"]) for _, match in matches if match), default=count)
    return keys, count - first


def _zeros(
    tensors: Mapping[str, Tensor], keys: set[str], count: int, adapter: Adapter, rank: int, *, dora: bool
) -> dict[str, Tensor]:
    """Factors that change nothing, for those modules of the last layers that the adapter leaves as they are."""
    start, layers = _layers(adapter)
    found: dict[str, Tensor] = {}
    for index in range(layers - count, layers):
        for path in (f"{start}{index}.{key}" for key in keys):
            if f"{path}.lora_a" in tensors:
                continue
            try:
                module = adapter.model.get_submodule(path)
            except AttributeError:
                continue  # a module outside the layers, or one that this layer lacks
            W = module.frozen.dense() if path in adapter.modules else module.weight.detach()  # type: ignore[operator, union-attr]
            found |= _pair(path, Factors(W.new_zeros(rank, W.shape[1]), W.new_zeros(len(W), rank)))
            if dora:
                found[f"{path}.m"] = W.double().norm(dim=1).float()
    return found
