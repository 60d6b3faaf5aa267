"""Every preset of mixtures on a tiny model."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from cases import move
from models import IDS
from torch import Tensor, nn

import reparam
from reparam.core.registry import METHODS
from reparam.methods.mixture import Mixture

SMALL: dict[str, dict[str, Any]] = {
    "task_gated": {"n": 4, "r": 8, "tasks": ("a", "b", "c")},
    "poly": {"n": 3, "r": 2, "tasks": ("a", "b", "c")},
    "mov": {"n": 3},
    "molora": {"n": 3, "r": 2},
    "llava_mole": {"n": 3, "r": 2, "dropout": 0.0},
    "moelora_contrastive": {"n": 4, "r": 2, "contrastive_warmup": 0.0},
    "mole": {"n": 3, "r": 2, "frozen": False, "pool": "all"},
    "xlora": {"n": 3, "r": 2, "frozen": False},
    "loramoe": {"n": 4, "r": 2, "dropout": 0.0},
    "hydralora": {"n": 3, "r": 2, "dropout": 0.0},
}


BY_TASK = [name for name in SMALL if "tasks" in SMALL[name]]


LOOKING = [name for name in SMALL if name not in BY_TASK]


presets = pytest.mark.parametrize("name", SMALL)


on_one_layer = pytest.mark.parametrize("name", [name for name in SMALL if name != "xlora"])  # which needs hidden states

MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]])  # of IDS, padded on the left
SEQUENCE: dict[str, Any] = {"pool": "prompt", "losses": {}}


def preset(name: str, **changes: Any) -> Mixture:
    return METHODS[name](**{**SMALL[name], **changes})  # type: ignore[return-value]


def adapted(name: str, model: nn.Module | None = None, *, seed: int | None = 1, **changes: Any) -> Any:
    """A tiny Llama with the mixture, its parameters moved from their initial values."""
    model = models.llama() if model is None else model
    adapter = reparam.attach(model, preset(name, **changes), name="one")
    if seed is not None:
        move(adapter, seed, size=0.2)
    return model, adapter


def run(model: nn.Module, name: str, ids: Tensor = IDS, **inputs: Any) -> Tensor:
    """Logits; for the first task, if there are several."""
    if name in BY_TASK:
        inputs = {"task": 0, **inputs}
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def layer(name: str, **changes: Any) -> tuple[nn.Sequential, Any, Tensor]:
    """One linear map with a mixture, in float64, and a batch for it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 14))
        x = torch.randn(3, 5, 10, dtype=torch.float64)
    adapter = reparam.attach(model, preset(name, plain="", **changes), targets=["0"])
    move(adapter, 1, size=0.5)
    return model.double().eval(), adapter, x
