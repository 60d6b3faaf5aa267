"""Every class of transformers that keeps the weights of experts stacked, as a module alone, and inputs for it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from typing import Any

import torch
import transformers.models
from torch import nn

from reparam.sites.experts import UNDECORATED

E, TOP, N = 4, 2, 9
"""Experts, experts of a token, and tokens."""
NAMES: list[tuple[str, Any]] = [
    (r"per_tok|top_?k", TOP),
    (r"n_shared|num_shared|shared_experts", E),
    (r"experts|n_routed", E),
    (r"zero_expert", 1),
    (r"latent", None),
    (r"moe_intermediate|intermediate|ffn_hidden|expert_dim", 12),
    (r"hidden_size|d_model|n_embd", 8),
    (r"act", "silu"),
    (r"limit", 7.0),
    (r"alpha", 1.7),
    (r"eps", 1e-6),
]


class Sizes:
    """A configuration that has a value for every name."""

    _experts_implementation: str | None = "eager"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return next((value for pattern, value in NAMES if re.search(pattern, name)), 8)

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        return self


def classes() -> dict[str, type[nn.Module]]:
    """The decorated classes, and those that reparam knows by name, by `<file>.<class>`."""
    found = {}
    for package in pkgutil.iter_modules(transformers.models.__path__):
        folder = f"{transformers.models.__path__[0]}/{package.name}"
        for file in pkgutil.iter_modules([folder]):
            if not file.name.startswith("modeling_"):
                continue
            path = f"{folder}/{file.name}.py"
            with open(path, encoding="utf-8") as source:
                text = source.read()
            names = re.findall(r"@use_experts_implementation(?:\([^)]*\))?\s*\nclass (\w+)", text)
            names += [name for name in UNDECORATED if f"class {name}(" in text]
            if names:
                module = importlib.import_module(f"transformers.models.{package.name}.{file.name}")
                found |= {f"{package.name}.{name}": getattr(module, name) for name in names}
    return found


def alone(
    cls: type[nn.Module], implementation: str = "eager", dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, tuple[Any, ...]]:
    """A module of this class with random weights, and inputs for its forward."""
    config = Sizes()
    config._experts_implementation = implementation
    takes = list(inspect.signature(cls.__init__).parameters)[1:]
    module = cls(*(E, 8, 12)) if takes[0] == "num_experts" else cls(config)
    draw = torch.Generator().manual_seed(0)
    module = module.to(dtype).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5, generator=draw)
    return module, inputs(module, draw, dtype)


def inputs(module: nn.Module, draw: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments for the forward of a module of experts."""
    takes = list(
        inspect.signature(
            type(module).forward.__wrapped__ if hasattr(type(module).forward, "__wrapped__") else type(module).forward
        ).parameters
    )[1:]
    x = torch.randn(N, 8, dtype=dtype, generator=draw)
    if takes == ["hidden_states"]:  # Llama 4: all tokens for each expert
        return (torch.randn(E * N, 8, dtype=dtype, generator=draw),)
    if "gammas" in takes:
        return (x, torch.rand(N, E, dtype=dtype, generator=draw))
    if takes == ["inputs", "expert_size"]:
        return (x, [4, 0, 3, 2])
    chosen = torch.rand(N, E, generator=draw).topk(TOP).indices
    weights = torch.rand(N, TOP, dtype=dtype, generator=draw)
    return (x, chosen, weights)
