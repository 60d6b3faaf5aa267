"""Adapters for tests with nonzero values everywhere, so that every difference shows."""

from typing import Any

import torch
from torch import Tensor, nn

import reparam
from reparam import LoRA


def trained(model: nn.Module, *, seed: int = 0, **settings: Any) -> reparam.Adapter:
    """An adapter on `model`; `settings` are those of `attach`."""
    settings = {"method": LoRA(r=2, alpha=4), "targets": ["q_proj", "up_proj"], **settings}
    adapter = reparam.attach(model, settings.pop("method"), **settings)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in adapter.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return adapter


def assert_equal_but_for_rounding(found: Tensor, expected: Tensor) -> None:
    """Assert that two float32 results differ by at most 1e-5 of the largest output."""
    apart, size = (found - expected).abs().max(), expected.abs().max()
    assert apart <= 1e-5 * size, f"apart by {float(apart / size):.2g} of the largest output"
