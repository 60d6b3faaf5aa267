"""Models with two adapters, and their outputs under a selection."""

from collections.abc import Callable
from typing import Any

import models
import torch
from models import IDS, VOCABULARY, logits
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


def ids_of(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def adapted(model: Any, **settings: Any) -> Any:
    moved(model, "a", 1, **settings)
    moved(model, "b", 2, r=3, **settings)
    return model


@torch.no_grad()
def rows_alone_or_refused(model: nn.Module, x: Tensor, **more: Tensor) -> bool:
    """Check the rows of a mixed batch, each against itself alone; False if the batch is refused."""

    def output(*row: int) -> Tensor:
        only = list(row) or list(range(len(x)))
        found = model(x[only], **{name: value[only] for name, value in more.items()})
        return found if isinstance(found, Tensor) else found.logits

    names = [("a", "b", None)[row % 3] for row in range(len(x))]
    alone = []
    for row, name in enumerate(names):
        with reparam.select(model, name):
            alone.append(output(row)[0])
    with reparam.select(model, names):
        try:
            found = output()
        except ValueError:
            return False
    assert close(found, torch.stack(alone))
    return True
