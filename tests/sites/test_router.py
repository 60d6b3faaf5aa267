"""Routers of a Mixture-of-Experts model: they train only when they are asked for."""

from pathlib import Path

import models
import pytest
import torch
from models import IDS, logits

import reparam


def test_a_router_trains_is_saved_loaded_merged_and_restored(tmp_path: Path) -> None:
    model = models.mixtral()
    base, shape = logits(model), str(model)
    adapter = reparam.attach(model, reparam.LoRA(r=2), targets="router")
    assert list(adapter.sites) == [f"model.layers.{i}.mlp.gate" for i in (0, 1)]
    assert torch.equal(logits(model), base)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    model(IDS).logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapter.parameters())
    y = logits(model)
    adapter.save(tmp_path / "a")
    other = models.mixtral()
    reparam.load(other, tmp_path / "a")
    assert torch.equal(logits(other), y)
    w = model.model.layers[0].mlp.gate.weight.detach().clone()
    delta = adapter.updates["model.layers.0.mlp.gate"].factors(adapter.modules["model.layers.0.mlp.gate"].frozen)
    report = reparam.merge(model, keep_base=True)
    assert str(model) == shape
    assert torch.allclose(model.model.layers[0].mlp.gate.weight, w + delta.B @ delta.A, atol=1e-6)
    assert torch.allclose(logits(model), y, atol=1e-5)
    report.restore()
    assert torch.equal(logits(model), y)


def test_a_router_in_a_mixed_batch_is_refused() -> None:
    model = models.mixtral()
    for name in ("a", "b"):
        adapter = reparam.attach(model, reparam.LoRA(r=2), targets="router", name=name)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += 0.1
    reparam.select(model, ["a", "b", None])
    with pytest.raises(ValueError, match="router cannot be part of a mixed batch"):
        model(IDS)
