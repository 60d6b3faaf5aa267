"""The dense storage: W [O, I] unchanged, in its own dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import MutableMapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.core.base import Storage, Weight
from reparam.core.placing import value_of
from reparam.core.registry import storage

Layout = Literal["rows", "transposed", "column"]
"""How a module keeps its matrix W [O, I]: as it is, as [I, O], or, for I = 1, as a vector [O]."""


@storage("dense")
@dataclasses.dataclass(frozen=True)
class Dense(Storage):
    """Configuration of the dense storage; it has no settings."""

    def quantize(self, w: Tensor) -> DenseWeight:
        """Wrap `w` [O, I] without copying it."""
        return DenseWeight(w)


def zero_weight(out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> DenseWeight:
    """A zero matrix [O, I], to compute an update without a base matrix. Its entries share one number in memory."""
    return DenseWeight(torch.zeros(1, 1, dtype=dtype).expand(out_features, in_features))


class DenseWeight(Weight):
    """A weight that is one frozen parameter: its own, or the parameter `weight` of a module (see `of`).

    The parameter of a module stays where torch, transformers and optimizers look for it. It is looked up at each use,
    so that code that replaces it (a device map, FSDP, weight tying) replaces it here as well. Where accelerate offloads
    it, W is read from where it is kept.
    """

    def __init__(self, w: Tensor, *, of: nn.Module | None = None, layout: Layout = "rows") -> None:
        super().__init__()
        self.out_features, self.in_features = as_matrix(w, layout).shape
        self.layout: Layout = layout
        self._holder: MutableMapping[str, nn.Parameter | None] = (self if of is None else of)._parameters
        self._of = () if of is None else (of,)  # in a tuple so that it is not a submodule
        if of is None:
            self.weight = w if isinstance(w, nn.Parameter) else nn.Parameter(w)  # the same object, so ties are kept
        self._holder["weight"].requires_grad_(False)  # type: ignore[union-attr]

    @classmethod
    def of(cls, module: nn.Module, layout: Layout) -> DenseWeight:
        """The parameter `weight` of a module, which keeps it, as a weight; the parameter is frozen."""
        return cls(module._parameters["weight"], of=module, layout=layout)  # type: ignore[arg-type]

    @property
    def matrix(self) -> Tensor:
        """W [O, I]: the parameter or a view of it."""
        return as_matrix(self.held()[0], self.layout)

    @property
    def storage(self) -> Dense:
        """The configuration, `Dense()`."""
        return Dense()

    @property
    def dense_or_none(self) -> Tensor:
        """W [O, I]: the parameter or a view of it."""
        return self.matrix

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., I] -> x Wᵀ + bias [..., O]."""
        return F.linear(x, self.matrix, bias)

    def cast(self, x: Tensor) -> Tensor:
        """x in the dtype of W; under autocast, x unchanged.

        transformers keeps T5's `wo` in float32 in a 16-bit model.
        """
        dtype = self.dtype
        if x.dtype is dtype or torch.is_autocast_enabled(x.device.type):
            return x
        return x.to(dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """ids [...] -> the rows W[ids] [..., I]."""
        return F.embedding(ids, self.matrix)

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """These rows of W in float32 [rows, I]; a view if W is float32."""
        return self.matrix.detach()[rows].float()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of W."""
        return self._holder["weight"].dtype  # type: ignore[union-attr]

    def held(self) -> tuple[Tensor, ...]:
        """The parameter; its value, if it is offloaded."""
        own: Tensor = self._holder["weight"]  # type: ignore[assignment]
        if own.is_meta and self._of and (value := value_of(self._of[0], "weight")) is not None:
            return (value,)
        return (own,)


def as_matrix(w: Tensor, layout: Layout) -> Tensor:
    """A module's parameter as W [O, I]; a view."""
    return w if layout == "rows" else w.t() if layout == "transposed" else w.unsqueeze(1)


def as_parameter(w: Tensor, layout: Layout) -> Tensor:
    """W [O, I] as a module keeps it; a view. The inverse of `as_matrix`."""
    return w if layout == "rows" else w.t() if layout == "transposed" else w.squeeze(1)
