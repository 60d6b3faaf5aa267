"""Save and load training state (optimizer, scheduler, random generators) as JSON and safetensors.

A state dict is a tree of dicts, lists, tuples, numbers, strings and tensors. It is stored in two files: `<name>.json`
holds the tree, with a reference in place of each tensor, and `<name>.safetensors` the tensors, if there are any.
Tuples, integer keys, infinities, NaN and tensors that occur twice are restored exactly. Reading executes no code.

| file                             | holds                                                             |
|----------------------------------|-------------------------------------------------------------------|
| optimizer.json, .safetensors     | `optimizer.state_dict()`                                          |
| scheduler.json                   | `scheduler.state_dict()`                                          |
| rng.json, .safetensors           | random generators, one entry per process: `random_state()`        |
| progress.json                    | state of the training loop; state of the loss scaler              |
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
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from reparam.errors import StateError
from reparam.io.native import read_json
from reparam.io.staged import inside

FORMAT = 1
_PARTS = ("optimizer", "scheduler", "rng", "progress")


class Stateful(Protocol):
    """An optimizer, scheduler or gradient scaler."""

    def state_dict(self) -> dict[str, Any]:
        """The complete state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> object:
        """Restore a state."""


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """Training state that `load_state` read from a checkpoint."""

    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    rng: list[dict[str, Any]]
    """States of the random generators, one entry per process in the order of ranks."""
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
    """Write training state into an existing folder.

    Args:
        folder: folder of the checkpoint, usually still under its temporary name.
        optimizer: its state must consist of plain tensors, not of sharded tensors or other subclasses.
        scheduler: its lambda functions are not saved, as in torch: create it with the same ones before loading.
        progress: state of the training loop, a tree of plain values and tensors.
        rng: `random_state()` of each process; by default that of this process.
        scaler: the gradient scaler of fp16 training.

    Raises:
        StateError: a state holds a value that cannot be saved. The message names its type and place.
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
    """Read the training state that `save_state` wrote. Tensors are on the CPU.

    Raises:
        StateError: a file is missing (the message names all missing ones) or cannot be read.
    """
    path = Path(folder)
    missing = [f"{name}.json" for name in _PARTS if not (path / f"{name}.json").is_file()]
    if missing:
        raise StateError(
            f"{path} lacks {', '.join(missing)}: without it training cannot continue where it stopped. "
            "Resume from another checkpoint, or start a new run"
        )
    trees = {name: read_tree(path, name) for name in _PARTS}
    rest = trees["progress"]
    return TrainingState(trees["optimizer"], trees["scheduler"], trees["rng"], rest["progress"], rest["scaler"])


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore a saved optimizer state bit for bit.

    Raises:
        StateError: the state belongs to an optimizer with other parameters or settings.
    """
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        raise StateError(f"the saved state does not fit this optimizer: {error}") from error
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, saved in state["state"].items():
        if not isinstance(index, int):
            continue  # not the state of a parameter
        parameter = parameters[index]
        held = optimizer.state[parameter]
        for key, value in saved.items():
            # torch casts each state tensor to its parameter's dtype, which would change fp32 moments of a bf16
            # parameter and quantized moments.
            if isinstance(value, Tensor) and isinstance(held.get(key), Tensor) and held[key].dtype != value.dtype:
                held[key] = value.to(parameter.device)


def restore(
    state: TrainingState, optimizer: torch.optim.Optimizer, scheduler: LRScheduler, scaler: Stateful | None
) -> None:
    """Restore optimizer, scheduler and gradient scaler.

    The learning rates are those of the scheduler's own rule at the saved step: a run may continue with more steps.

    Raises:
        StateError: the state belongs to an optimizer with other parameters or settings.
    """
    restore_optimizer(optimizer, state.optimizer)
    scheduler.load_state_dict(state.scheduler)
    if isinstance(scheduler, LambdaLR):
        for group, peak, rule in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = peak * rule(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
    if scaler is not None and state.scaler is not None:
        scaler.load_state_dict(state.scaler)


def random_state() -> dict[str, Any]:
    """Return the state of the random generators of Python, numpy, torch and, if CUDA is in use, all CUDA devices."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    bits = np.random.get_state(legacy=False)
    bits["state"] = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in bits["state"].items()}
    return {"python": random.getstate(), "numpy": bits, "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the generators to a result of `random_state()`. States of CUDA devices that do not exist are ignored."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    for device, saved in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(saved, device)


# ---- trees


def write_tree(folder: Path, name: str, tree: Any) -> None:
    """Write a state dict as `<name>.json` and `<name>.safetensors`. Raises StateError for unsupported values."""
    writer = _Writer(f"{name} state")
    encoded = writer.encode(tree, "")
    text = json.dumps({"format": FORMAT, "tensors": len(writer.tensors), "tree": encoded}, allow_nan=False)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    if writer.tensors:
        save_file(writer.tensors, folder / f"{name}.safetensors")


def read_tree(folder: Path, name: str) -> Any:
    """Read a tree that `write_tree` wrote, with tensors on the CPU. Raises StateError for missing or damaged files."""
    if not (folder / f"{name}.json").is_file():
        raise StateError(f"{folder} lacks {name}.json: without it training cannot continue where it stopped")
    file, beside = inside(folder, f"{name}.json"), folder / f"{name}.safetensors"
    try:
        plain = read_json(file)
        if plain["format"] != FORMAT:
            raise StateError(f"{file} has format {plain['format']!r}, but this version reads only {FORMAT}")
        if plain["tensors"] and not beside.is_file():
            raise StateError(f"{folder} lacks {beside.name}: without it training cannot continue where it stopped")
        return _decode(plain["tree"], load_file(beside) if plain["tensors"] else {})
    except StateError:
        raise
    except (ValueError, TypeError, KeyError, SafetensorError) as error:
        raise StateError(f"{file} or {beside.name} cannot be read ({type(error).__name__}: {error})") from error


class _Writer:
    """Converts a tree to JSON values and collects its tensors."""

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
            f"the {self.what} holds a {type(value).__name__} at {path or 'its top'}: only tensors, numbers, strings, "
            "lists, tuples and dicts can be saved"
        )

    def _keep(self, tensor: Tensor, path: str) -> str:
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            raise StateError(
                f"the {self.what} holds a {type(tensor).__name__} at {path}: only plain tensors can be saved, "
                "not sharded tensors or other subclasses"
            )
        # A tensor that occurs twice is saved once. The tree keeps it alive, so its id is not reused.
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
