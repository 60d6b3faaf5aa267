"""Models with two adapters, and their outputs under a selection."""

from collections.abc import Callable
from typing import Any

import models
import torch
from models import IDS, logits
from torch import Tensor, nn

import reparam
from reparam.sites.bank import Bank


def moved(model: nn.Module, name: str, seed: int, **settings: Any) -> reparam.Adapter:
    """Attach an adapter that changes the outputs."""
    adapter = reparam.attach(model, reparam.LoRA(r=settings.pop("r", 2), alpha=8), name=name, **settings)
    change(adapter, seed)
    return adapter


@torch.no_grad()
def change(adapter: reparam.Adapter, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.15)


def two(make: Callable[[], Any] = models.llama) -> Any:
    """A model with the adapters a and b; a is selected."""
    model = make()
    moved(model, "a", 1)
    moved(model, "b", 2, r=3)
    reparam.select(model, "a")
    return model


@torch.no_grad()
def under(model: nn.Module, which: Any, ids: Tensor = IDS) -> Tensor:
    with reparam.select(model, which):
        return logits(model, ids)


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def check_rows(model: nn.Module, rows: list[str | None], ids: Tensor = IDS) -> None:
    """Check that each row of a mixed batch equals that adapter alone, and that the rows differ."""
    alone = {name: under(model, name, ids) for name in set(rows)}
    mixed = under(model, rows, ids)
    for row, name in enumerate(rows):
        assert close(mixed[row], alone[name][row]), name
    different = [alone[name] for name in alone]
    for i, one in enumerate(different):
        assert not any(close(one, other) for other in different[i + 1 :])


def banks(model: nn.Module) -> list[Bank]:
    return [module for module in model.modules() if isinstance(module, Bank)]
