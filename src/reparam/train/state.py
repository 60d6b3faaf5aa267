"""The state of training beside the trained weights, in safetensors and JSON: optimizer, scheduler, random generators.

A state dict is a tree of dicts, lists, tuples, numbers, text and tensors. Each is stored as `<name>.json`, the tree
with a reference in place of each tensor, and `<name>.safetensors`, the tensors, if there are any. Types come back as
they were (tuples, integer keys, infinities, a tensor that stands in two places); nothing is executed on reading.

| file                             | holds                                                             |
|----------------------------------|-------------------------------------------------------------------|
| optimizer.json, .safetensors     | `optimizer.state_dict()`                                          |
| scheduler.json                   | `scheduler.state_dict()`                                          |
| rng.json, .safetensors           | random generators, one entry per process: `random_state()`        |
| progress.json                    | what the training loop has to remember; the loss scaler's state   |
"""

import dataclasses
import json
import math
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from reparam.errors import StateError
from reparam.io.staged import inside

FORMAT = 1
_PARTS = ("optimizer", "scheduler", "rng", "progress")


class Stateful(Protocol):
    """An optimizer, a scheduler, a loss scaler."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that it needs to continue."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> object:
        """Continue from there."""


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """What `save_state` saved."""

    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    rng: list[dict[str, Any]]
    """One entry per process, by rank."""
    progress: dict[str, Any]
    scaler: dict[str, Any] | None


def save_state(
    folder: str | os.PathLike[str],
    *,
    optimizer: Stateful,
    scheduler: Stateful,
    progress: dict[str, Any],
    rng: Sequence[dict[str, Any]] | None = None,
    scaler: Stateful | None = None,
) -> None:
    """Write the state of training into a folder that exists.

    Args:
        folder: the checkpoint that is being staged.
        optimizer: with plain tensors; sharded ones and other tensor subclasses are refused.
        scheduler: its functions are not saved (torch leaves them out too): make it with the same ones.
        progress: what the training loop remembers.
        rng: `random_state()` of each process; this process alone if not given.
        scaler: the gradient scaler of fp16 training.

    Raises:
        StateError: a state holds something that JSON and safetensors cannot; names it.
    """
    trees: dict[str, Any] = {
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "rng": list(rng) if rng is not None else [random_state()],
        "progress": {"progress": progress, "scaler": scaler.state_dict() if scaler is not None else None},
    }
    for name, tree in trees.items():
        write_tree(Path(folder), name, tree)


def load_state(folder: str | os.PathLike[str]) -> TrainingState:
    """Read what `save_state` wrote, tensors on the CPU.

    Raises:
        StateError: files are missing (all are named) or cannot be read. Training on without one of them would not be
            the same training.
    """
    path = Path(folder)
    missing = [f"{name}.json" for name in _PARTS if not (path / f"{name}.json").is_file()]
    if missing:
        raise StateError(
            f"{path} lacks {', '.join(missing)}: without it training cannot continue where it stopped. "
            "Resume from another checkpoint, or start again"
        )
    trees = {name: read_tree(path, name) for name in _PARTS}
    rest = trees["progress"]
    return TrainingState(trees["optimizer"], trees["scheduler"], trees["rng"], rest["progress"], rest["scaler"])


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimizer a saved state, bit for bit.

    Raises:
        StateError: it was saved by an optimizer with other parameters.
    """
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        raise StateError(f"the saved state is not of this optimizer: {error}") from error
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, saved in state["state"].items():
        if not isinstance(index, int):
            continue  # not the state of a parameter
        parameter = parameters[index]
        held = optimizer.state[parameter]
        for key, value in saved.items():
            # torch casts each state tensor to its parameter's dtype; fp32 moments of a bf16 parameter, or quantized
            # ones, would come back as something else.
            if isinstance(value, Tensor) and isinstance(held.get(key), Tensor) and held[key].dtype != value.dtype:
                held[key] = value.to(parameter.device)


def random_state() -> dict[str, Any]:
    """Return the state of the generators of Python, numpy, torch, and each CUDA device that is in use."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    bits = np.random.get_state(legacy=False)
    bits["state"] = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in bits["state"].items()}
    return {"python": random.getstate(), "numpy": bits, "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    """Continue with the random numbers after `random_state()`. CUDA devices that are not here are left out."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    for device, saved in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(saved, device)


# ---- trees


def write_tree(folder: Path, name: str, tree: Any) -> None:
    """Write a state dict as `<name>.json` and `<name>.safetensors`. Raises StateError for what they cannot hold."""
    writer = _Writer(f"{name} state")
    encoded = writer.encode(tree, "")
    text = json.dumps({"format": FORMAT, "tensors": len(writer.tensors), "tree": encoded}, allow_nan=False)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    if writer.tensors:
        save_file(writer.tensors, folder / f"{name}.safetensors")


def read_tree(folder: Path, name: str) -> Any:
    """Read what `write_tree` wrote, tensors on the CPU. Raises StateError where it is missing or cannot be read."""
    if not (folder / f"{name}.json").is_file():
        raise StateError(f"{folder} lacks {name}.json: without it training cannot continue where it stopped")
    file, beside = inside(folder, f"{name}.json"), folder / f"{name}.safetensors"
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        if plain["format"] != FORMAT:
            raise StateError(f"{file} has format {plain['format']!r}, and this version reads {FORMAT}")
        if plain["tensors"] and not beside.is_file():
            raise StateError(f"{folder} lacks {beside.name}: without it training cannot continue where it stopped")
        return _decode(plain["tree"], load_file(beside) if plain["tensors"] else {})
    except StateError:
        raise
    except (ValueError, TypeError, KeyError, SafetensorError) as error:
        raise StateError(f"{file} or {beside.name} cannot be read ({type(error).__name__}: {error})") from error


class _Writer:
    """Turns a tree into JSON values, and collects its tensors on the way."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        self._storages: set[int] = set()

    def encode(self, value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            return {"$tensor": self._keep(value, path)}
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$float": str(float(value))}
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, dict):
            pairs = [(key, self.encode(item, f"{path}/{key}" if path else str(key))) for key, item in value.items()]
            if all(isinstance(key, str) and not key.startswith("$") for key, _ in pairs):
                return dict(pairs)
            return {"$dict": [[self.encode(key, f"{path}/(key)"), item] for key, item in pairs]}
        if isinstance(value, (list, tuple)):
            items = [self.encode(item, f"{path}/{index}" if path else str(index)) for index, item in enumerate(value)]
            return {"$tuple": items} if isinstance(value, tuple) else items
        raise StateError(
            f"the {self.what} holds a {type(value).__name__} at {path or 'its top'}: only tensors, numbers, text, "
            "lists, tuples and dicts can be saved"
        )

    def _keep(self, tensor: Tensor, path: str) -> str:
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            raise StateError(
                f"the {self.what} holds a {type(tensor).__name__} at {path}: only plain tensors can be saved, "
                "not sharded or other kinds"
            )
        # The same tensor in two places stays one. The tree keeps it alive, so its id is not used again.
        if id(tensor) not in self._names:
            name = path if path not in self.tensors else f"{path}#{len(self.tensors)}"
            kept = tensor.detach().to("cpu").contiguous()
            storage = kept.untyped_storage()
            if storage.nbytes() != kept.nbytes or storage.data_ptr() in self._storages:
                kept = kept.clone()  # safetensors refuses tensors that share memory
            self._storages.add(kept.untyped_storage().data_ptr())
            self._names[id(tensor)], self.tensors[name] = name, kept
        return self._names[id(tensor)]


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match list(value.items()):
        case [("$tensor", name)]:
            return tensors[name]
        case [("$float", text)]:
            return float(text)
        case [("$tuple", items)]:
            return tuple(_decode(item, tensors) for item in items)
        case [("$dict", pairs)]:
            return {_decode(key, tensors): _decode(item, tensors) for key, item in pairs}
        case pairs:
            return {key: _decode(item, tensors) for key, item in pairs}
