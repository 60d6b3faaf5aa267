"""What quantized storages share: how they keep float32 statistics, remember a dtype, and refuse bad input."""

from __future__ import annotations

from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.core.base import Factors, Weight
from reparam.weights.dense import Layout, as_parameter
from reparam.weights.rounding import moves

ROUNDINGS = ("aware", "nearest")
_PIECE = 1 << 22
"""Entries that are rounded at once: some ten temporaries of 16 MiB."""

PACKABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGEST = 2.0**100
"""About 1e30. Beyond it the sums and products that statistics are made of can overflow float32."""


class QuantizedWeight(Weight):
    """A weight of whole numbers. Its results have the dtype that the matrix had, or that the model was moved to since.

    Statistics in float32 are kept as the bits of int32, because `.to(bfloat16)`, `.half()` and mixed-precision
    policies round every floating-point tensor that they find.
    """

    like: Tensor

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        # No entries; it is there because `model.to(dtype)` changes its dtype, and so says what results are to be.
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrix that was quantized, or the one that the model was moved to."""
        return self.like.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """O and I."""
        return self.out_features, self.in_features

    def neighbors(self, rows: slice) -> tuple[Tensor, Tensor]:
        """How entries of these rows [rows, I] change when their code is one higher, and one lower; 0 at the ends."""
        raise NotImplementedError

    def coded(self, w: Tensor) -> Self:
        """The same statistics with the codes that are nearest to `w` [O, I]."""
        raise NotImplementedError

    def moved(self, steps: Tensor) -> Self:
        """The same statistics with each code moved by so many levels, int8 [O, I]."""
        raise NotImplementedError

    def requantize(self, factors: Factors, rounding: str) -> Weight:
        """W' in the same format. Raises ValueError for an unknown rounding.

        "nearest" quantizes W' anew. "aware" begins there, or at the nearest codes with the magnitudes as they are,
        which leaves entries alone that did not change; and moves codes so that ΔW keeps its effect, see `rounding.py`.
        """
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding={rounding!r}: expected one of {', '.join(ROUNDINGS)}")
        old = self.dense()
        wanted = old + factors.change(old)
        anew = cast(QuantizedWeight, self.storage.quantize(wanted).to(self.dtype))
        if rounding == "nearest":
            return anew
        near = min(self.coded(wanted), anew, key=lambda weight: float((wanted - weight.dense()).norm()))
        shared = torch.linalg.qr(factors.A.float().T)[0][None] if factors.gain is None else None  # [1, I, R]
        steps = torch.empty(self.shape, dtype=torch.int8, device=self.device)
        size = max(1, _PIECE // self.in_features)
        for start in range(0, self.out_features, size):
            rows = slice(start, start + size)
            basis = F.normalize(wanted[rows] - old[rows], dim=1).unsqueeze(2) if shared is None else shared
            steps[rows] = moves(wanted[rows] - near.dense(rows), *near.neighbors(rows), basis)
        return near.moved(steps)


class QuantizedMatrix(Tensor):
    """What a module shows as its `weight` while the matrix is quantized: dtype, shape and device, and no numbers.

    Models read these of a child's weight. Anything that needs the numbers raises TypeError.
    """

    @classmethod
    def of(cls, weight: Weight, layout: Layout) -> Self:
        """The parameter that the module would have if this matrix [O, I] were dense."""
        shape = as_parameter(torch.empty(weight.out_features, weight.in_features, device="meta"), layout).shape
        found = Tensor._make_wrapper_subclass(cls, shape, dtype=weight.dtype, device=weight.device)
        found.storage_name = weight.storage.name
        return found

    storage_name: str

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantizedMatrix({self.storage_name}, {list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Refuse every operation."""
        name = next(arg.storage_name for arg in args if isinstance(arg, cls))
        raise TypeError(
            f"{func}: this weight is quantized ({name}), and only calling its module computes with it; "
            f"reparam.quantize(model, 'dense', targets=...) dequantizes it"
        )


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter that never trains."""
    return nn.Parameter(tensor, requires_grad=False)


def bits(statistics: Tensor) -> nn.Parameter:
    """float32 as a frozen parameter of int32."""
    return frozen(statistics.contiguous().view(torch.int32))


def floats(stored: Tensor) -> Tensor:
    """The float32 that `bits` stored; a view."""
    return stored.view(torch.float32)


def check_quantizable(w: Tensor, storage: str) -> None:
    """Raise ValueError unless `w` is a matrix of finite floating-point numbers with entries."""
    if w.ndim != 2 or w.dtype not in PACKABLE or not w.numel():
        raise ValueError(
            f"{storage}: expected a matrix of floating-point numbers with entries, got {str(w.dtype)[6:]} "
            f"{list(w.shape)}" + ("; is it quantized already?" if w.dtype not in PACKABLE else "")
        )
    if not w.is_meta and not all(abs(float(end)) <= LARGEST for end in w.detach().aminmax()):  # one pass, no copy
        place = [int(i) for i in (~(w.detach().abs().float() <= LARGEST)).nonzero()[0]]
        raise ValueError(
            f"{storage}: the matrix holds NaN, infinity or numbers beyond 1e30 (first at {place}), which would spoil "
            f"their whole block"
        )
