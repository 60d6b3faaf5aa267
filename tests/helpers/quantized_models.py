"""Quantized models, their matrices, and the plain models with the same matrices."""

from __future__ import annotations

from typing import Any

import pytest
from models import llama
from torch import Tensor, nn

import reparam
from reparam import NF4, Int8
from reparam.core.base import Storage
from reparam.sites.module import Adapted

STORAGES = [NF4(), NF4(32, double=False), Int8()]
ENTRIES = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)  # of the linear maps in the blocks of `llama`
every = pytest.mark.parametrize("storage", STORAGES, ids=str)


def quantized(storage: str | Storage = "nf4", **settings: Any) -> Any:
    model = llama()
    reparam.quantize(model, storage, **settings)
    return model


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """The dequantized matrices."""
    return {
        path: module.frozen.dense().clone()
        for path, module in model.named_modules()
        if isinstance(module, Adapted) and module.frozen.dense_or_none is None
    }


def stock(model: nn.Module, found: dict[str, Tensor]) -> nn.Module:
    """A plain model with these matrices."""
    for path, matrix in found.items():
        above, _, name = path.rpartition(".")
        if above.rpartition(".")[0].endswith(".experts"):  # a part of a stack
            holder, _, number = above.rpartition(".")
            model.get_parameter(f"{holder}.{name}").data[int(number)] = matrix
            continue
        model.get_submodule(path).weight.data.copy_(matrix)  # type: ignore[union-attr]
    return model


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
