"""One layer with DoRA, its dense formula, and its effective weight."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reparam
from reparam.core.base import Site
from reparam.core.registry import STORAGES
from reparam.methods.dora import DoRAUpdate
from reparam.methods.lora import LoRAUpdate
from reparam.sites.linear import Linear

axes = pytest.mark.parametrize("axis", ["output", "input"])


stored = pytest.mark.parametrize("storage", STORAGES)


def layer(w: Tensor, *, r: int = 2, seed: int = 0, size: float = 0.3, **settings: Any) -> Linear:
    """A layer with this matrix, in its dtype, and a random update; no bias."""
    plain = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
    plain.weight = nn.Parameter(w.clone())
    adapted = Linear.wrap(plain)
    method = reparam.DoRA(**{"r": r, "alpha": 2.0 * r, **settings})
    adapted.add("a", method.build(Site("layer", "linear", *w.shape), adapted.frozen, None))
    adapted.active = "a"
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.updates["a"].parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return adapted.double().eval() if w.dtype == torch.float64 else adapted.eval()


def update_of(adapted: Linear) -> DoRAUpdate:
    found = adapted.updates["a"]
    assert isinstance(found, DoRAUpdate)
    return found


def factors_of(adapted: Linear) -> tuple[nn.Parameter, nn.Parameter, float]:
    found = update_of(adapted).low_rank
    assert isinstance(found, LoRAUpdate)
    return found.A, found.B, found.scale


def random(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def direction(adapted: Linear) -> Tensor:
    """W + s B A [O, I] in float64, dense."""
    A, B, s = factors_of(adapted)
    return adapted.frozen.tensor().double() + s * (B.double() @ A.double())


def expected(adapted: Linear, *, detached: bool, dim: int = 1) -> Tensor:
    """W' in float64 by the paper's formula, differentiable."""
    v = direction(adapted)
    norm = v.norm(dim=dim, keepdim=True)
    norm = norm.detach() if detached else norm
    return update_of(adapted).magnitude.double().unsqueeze(dim) * v / norm


def actual(adapted: Linear) -> Tensor:
    """W' [O, I], by applying it."""
    return adapted(torch.eye(adapted.frozen.in_features, dtype=adapted.frozen.dtype)).t()
