"""The base class of quantized weights: float32 statistics, the dtype of results, requantizing, and input checks."""

from __future__ import annotations

from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.core.base import Factors, Weight
from reparam.errors import ReparamError
from reparam.weights.dense import Layout, as_parameter
from reparam.weights.rounding import moves

ROUNDINGS = ("aware", "nearest")
_PIECE = 1 << 22
"""Entries rounded at a time; about ten temporaries of 16 MiB each."""

PACKABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGEST = 2.0**100
"""About 1.3e30. Larger values can overflow float32 in the sums and products that compute the statistics."""


class QuantizedWeight(Weight):
    """A weight of integer codes. Results have the dtype of the quantized matrix or of the last `model.to(dtype)`.

    float32 statistics are stored as int32 tensors with the same bits, because `.to(bfloat16)`, `.half()` and
    mixed-precision policies would round floating-point tensors.
    """

    like: Tensor

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        # An empty tensor whose dtype is that of the results; `model.to(dtype)` changes it.
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of results: that of the quantized matrix, or of the last `model.to(dtype)`."""
        return self.like.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.out_features, self.in_features

    def neighbors(self, rows: slice) -> tuple[Tensor, Tensor]:
        """How these entries [rows, I] change if their code is one higher, and one lower; 0 if no such code exists."""
        raise NotImplementedError

    def coded(self, w: Tensor) -> Self:
        """A weight with the same statistics and the codes nearest to `w` [O, I]."""
        raise NotImplementedError

    def moved(self, steps: Tensor) -> Self:
        """A weight with the same statistics and each code moved by `steps` levels, int8 [O, I]."""
        raise NotImplementedError

    def requantize(self, factors: Factors, rounding: str) -> Weight:
        """W' in the same format. Raises ValueError for an unknown `rounding`.

        "nearest" quantizes W' from scratch. "aware" starts from that result or from the nearest codes with the old
        statistics, whichever is closer to W', and moves codes so that ΔW keeps its effect (see `rounding.py`).
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

    Models read these of a child's weight. Anything that needs the numbers raises ReparamError.
    """

    @classmethod
    def of(cls, weight: Weight, layout: Layout) -> Self:
        """The parameter that the module would have if this matrix [O, I] were dense."""
        shape = as_parameter(torch.empty(weight.out_features, weight.in_features, device="meta"), layout).shape
        found = Tensor._make_wrapper_subclass(cls, shape, dtype=weight.dtype, device=weight.device)
        found.storage_name = weight.storage.name
        found._is_hf_initialized = True  # type: ignore[attr-defined]  # so that transformers does not draw numbers for it
        return found

    storage_name: str

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantizedMatrix({self.storage_name}, {list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Refuse every operation."""
        name = next(arg.storage_name for arg in args if isinstance(arg, cls))
        raise ReparamError(
            f"{func}: this weight is quantized ({name}), and only calling its module computes with it; "
            f"reparam.quantize(model, 'dense', targets=...) dequantizes it"
        )


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter with requires_grad=False."""
    return nn.Parameter(tensor, requires_grad=False)


def bits(statistics: Tensor) -> nn.Parameter:
    """A frozen int32 parameter with the bits of this float32 tensor."""
    return frozen(statistics.contiguous().view(torch.int32))


def floats(stored: Tensor) -> Tensor:
    """The float32 tensor that `bits` stored, as a view."""
    return stored.view(torch.float32)


def check_quantizable(w: Tensor, storage: str) -> None:
    """Raise ValueError unless `w` is a non-empty matrix of floating-point numbers, finite and at most `LARGEST`."""
    if w.ndim != 2 or w.dtype not in PACKABLE or not w.numel():
        raise ValueError(
            f"{storage}: expected a non-empty matrix of floating-point numbers, got {str(w.dtype)[6:]} "
            f"{list(w.shape)}" + ("; is it quantized already?" if w.dtype not in PACKABLE else "")
        )
    if not w.is_meta and not all(abs(float(end)) <= LARGEST for end in w.detach().aminmax()):  # one pass, no copy
        place = [int(i) for i in (~(w.detach().abs().float() <= LARGEST)).nonzero()[0]]
        raise ValueError(
            f"{storage}: the matrix contains NaN, infinity or values beyond 1e30 (first at {place}), which would "
            f"corrupt all entries with the same scale"
        )
