"""The int8 storage: integers from -127 to 127, 8 bits per entry, scaled by the largest magnitude of each row (absmax).

    q = round(127 · w / absmax),    ŵ = q · (absmax / 127)

One outlier in a row makes its other entries less precise: [2, 3, 4, 1000] becomes [0, 0, 1, 127]. NF4 limits this to
blocks. Ties are rounded to even. Shapes: O out_features, I in_features.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from reparam.core.base import Storage
from reparam.core.registry import storage
from reparam.kernels.frozen import frozen_linear
from reparam.weights.quantized import QuantizedWeight, bits, check_quantizable, floats, frozen

LEVELS = 127


@storage("int8")
@dataclasses.dataclass(frozen=True)
class Int8(Storage):
    """Configuration of the int8 storage; it has no settings.

    >>> Int8().quantize(torch.tensor([[2.0, 3.0, 4.0, 1000.0]])).codes.tolist()
    [[0, 0, 1, 127]]
    """

    def quantize(self, w: Tensor) -> Int8Weight:
        """Quantize `w` [O, I]. Raises ValueError unless it is a non-empty matrix of finite floating-point values."""
        check_quantizable(w, self.name)
        wide = w.detach().float()
        absmax = wide.abs().amax(1)  # [O]
        return Int8Weight(_codes(wide, absmax), absmax, w.dtype)


class Int8Weight(QuantizedWeight):
    """Codes int8 [O, I], and one float32 absmax per row [O]."""

    def __init__(self, codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> None:
        super().__init__((codes.shape[0], codes.shape[1]), dtype, codes.device)
        self.codes = frozen(codes)  # [O, I] int8
        self.absmax = bits(absmax)  # [O]

    @property
    def storage(self) -> Int8:
        """The configuration, `Int8()`."""
        return Int8()

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., I] -> x Wᵀ + bias [..., O]."""
        return _linear(x, (self.codes, floats(self.absmax)), self.shape, bias)

    def rows(self, ids: Tensor) -> Tensor:
        """ids [...] -> the rows W[ids] [..., I] in `dtype`."""
        return _values(F.embedding(ids, self.codes), floats(self.absmax)[ids]).to(self.dtype)

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """These rows of W in float32 [rows, I]."""
        return _values(self.codes[rows], floats(self.absmax)[rows])

    def neighbors(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The step absmax / 127 of each row, up and down; 0 for codes at the end of the range."""
        codes, step = self.codes[rows], (floats(self.absmax)[rows] / LEVELS)[:, None]
        return torch.where(codes < LEVELS, step, 0), torch.where(codes > -LEVELS, -step, 0)

    def coded(self, w: Tensor) -> Int8Weight:
        """The same absmax with the codes nearest to `w` [O, I]."""
        absmax = floats(self.absmax).clone()
        return Int8Weight(_codes(w, absmax), absmax, self.dtype)

    def moved(self, steps: Tensor) -> Int8Weight:
        """The same absmax with `steps` int8 [O, I] added to the codes."""
        return Int8Weight(self.codes + steps, floats(self.absmax).clone(), self.dtype)


def _codes(w: Tensor, absmax: Tensor) -> Tensor:
    scaled = w * LEVELS / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return scaled.round_().clamp_(-LEVELS, LEVELS).to(torch.int8)


def _values(codes: Tensor, absmax: Tensor) -> Tensor:
    return codes * (absmax / LEVELS).unsqueeze(-1)  # float32: one rounding


def _dequantize(codes: Tensor, absmax: Tensor, shape: list[int], start: int, stop: int, dtype: torch.dtype) -> Tensor:
    return _values(codes[start:stop], absmax[start:stop]).to(dtype)


_linear = frozen_linear("int8", "Tensor codes, Tensor absmax", _dequantize)
