"""NF4: 16 levels for normally distributed weights, 4 bits per entry (Dettmers et al. 2023, arXiv 2305.14314, §3).

A matrix is flattened row by row and divided into blocks of `block` entries. A block may cross rows, and the last may be
shorter. For each block its largest magnitude c (absmax) is stored in float32. The code of an entry w is the number of
thresholds below w · (1/c), so ties go to the lower code. Two codes share a byte, the first in the high half; an odd
number of entries is padded with a zero.

    ŵ = CODE[index] · c

Double quantization also stores c in 8 bits: the mean of all c is subtracted, and each block of 256 differences is coded
with a signed dynamic map and one scale. Bytes, statistics and order of operations are those of bitsandbytes 0.50 on
CUDA, except that entries of an all-zero block get the code of zero, as in its CPU version.

This file defines the ops. `nf4_reference` implements them in torch, `nf4_cpu` has compiled kernels for a CPU, and
`nf4_gpu` kernels in Triton. The kernels produce the same bytes as the reference on every device.

Shapes: n entries, N blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reparam.kernels import nf4_reference as reference
from reparam.kernels.nf4_tables import Statistics


def quantize(w: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Quantize `w`, of any shape with n entries, to codes uint8 [⌈n/2⌉] and absmax float32 [⌈n/block⌉].

    All values must be finite; the caller must check for NaN and infinity.

    >>> codes, absmax = quantize(torch.tensor([1.0, -1.0, 0.0, 0.5]), 64)
    >>> bytes(codes.tolist()).hex(), absmax.tolist()
    ('f07c', [1.0])
    """
    return torch.ops.reparam.nf4_quantize.default(w, block)


def dequantize(
    codes: Tensor,
    stats: Statistics,
    *,
    block: int,
    count: int,
    dtype: torch.dtype,
    first: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Dequantize `count` entries from block number `first` on, to a tensor [count] of `dtype`.

    The result is computed in float32, rounded once, and written into `out` (contiguous) if given.

    >>> dequantize(torch.tensor([0xF0], dtype=torch.uint8), Statistics(torch.tensor([2.0])), block=64, count=2,
    ...            dtype=torch.bfloat16).tolist()
    [2.0, -2.0]
    """
    out = codes.new_empty(count, dtype=dtype) if out is None else out
    torch.ops.reparam.nf4_dequantize_.default(out, codes, *stats, block, first)
    return out


def compress_scales(absmax: Tensor) -> Statistics:
    """Double quantization of absmax, float32 [N]: to 8 bits each and one float32 scale per 256.

    >>> stats = compress_scales(torch.tensor([0.5, 1.0]))
    >>> stats.absmax.tolist(), stats.offset.tolist()
    ([0, 255], [0.75])
    """
    return reference.compress_scales(absmax, torch.ops.reparam.nf4_nearest.default)


def few_rows(x: Tensor, codes: Tensor, stats: Statistics, block: int, shape: Sequence[int]) -> Tensor | None:
    """x [M, I] -> x Wᵀ [M, O] without unpacking W [O, I]; None if no kernel supports the device, dtype or M."""
    kernels = _kernels("cuda") if x.device.type == "cuda" and x.dtype != torch.float64 else None
    if kernels is None or not 0 < len(x) <= kernels.MOST_ROWS:
        return None
    return kernels.matvec(x.contiguous(), codes, stats, block, (shape[0], shape[1]))


# ---- the ops

_QUANTIZE, _DEQUANTIZE, _NEAREST = "reparam::nf4_quantize", "reparam::nf4_dequantize_", "reparam::nf4_nearest"
_STATISTICS = "Tensor absmax, Tensor? nested, Tensor? offset, Tensor? map"
_TAG = torch.Tag.pt2_compliant_tag
torch.library.define(_QUANTIZE, "(Tensor w, int block) -> (Tensor codes, Tensor absmax)", tags=_TAG)
torch.library.define(
    _DEQUANTIZE, f"(Tensor(a!) out, Tensor codes, {_STATISTICS}, int block, int first) -> ()", tags=_TAG
)
torch.library.define(_NEAREST, "(Tensor scaled) -> Tensor", tags=_TAG)


@torch.library.impl(_QUANTIZE, "CompositeExplicitAutograd")
def _quantize(w: Tensor, block: int) -> tuple[Tensor, Tensor]:
    kernels = _kernels(w.device.type)
    if kernels is None or w.dtype == torch.float64:
        return reference.quantize_reference(w, block)
    return kernels.quantize(w.detach().contiguous(), block)


@torch.library.impl(_DEQUANTIZE, "CompositeExplicitAutograd")
def _dequantize(
    out: Tensor, codes: Tensor, absmax: Tensor, nested: Tensor | None, offset: Tensor | None, map: Tensor | None,
    block: int, first: int,
) -> None:  # fmt: skip
    assert out.is_contiguous()  # kernels use raw addresses
    assert first * block + out.numel() <= 2 * codes.numel()
    stats = Statistics(absmax, nested, offset, map)
    kernels = _kernels(out.device.type) if out.dtype != torch.float64 else None
    if kernels is not None:
        kernels.dequantize(out, codes, stats, block, first)
        torch.autograd.graph.increment_version(out)  # autograd does not see the kernel's write
        return
    if first:
        last = first - (-out.numel() // block)
        stats = Statistics(reference.magnitudes(stats, torch.arange(first, last, device=out.device)))
    codes = codes[first * block // 2 :]
    flat = reference.dequantize_reference(codes, stats, block=block, count=out.numel(), dtype=out.dtype)
    out.copy_(flat.view(out.shape))


@torch.library.impl(_NEAREST, "CompositeExplicitAutograd")
def _nearest(scaled: Tensor) -> Tensor:
    kernels = _kernels("cpu") if scaled.device.type == "cpu" else None
    return (reference if kernels is None else kernels).nearest_code(scaled)


@torch.library.register_fake(_NEAREST)
def _nearest_fake(scaled: Tensor) -> Tensor:
    return scaled.new_empty(scaled.shape, dtype=torch.uint8)


@torch.library.register_fake(_QUANTIZE)
def _quantize_fake(w: Tensor, block: int) -> tuple[Tensor, Tensor]:
    codes = w.new_empty((w.numel() + 1) // 2, dtype=torch.uint8)
    return codes, w.new_empty((w.numel() + block - 1) // block, dtype=torch.float32)


@torch.library.register_fake(_DEQUANTIZE)
def _dequantize_fake(
    out: Tensor, codes: Tensor, absmax: Tensor, nested: Tensor | None, offset: Tensor | None, map: Tensor | None,
    block: int, first: int,
) -> None:  # fmt: skip
    return None


@functools.cache
def _kernels(device: str) -> Any | None:
    """The module of compiled kernels for this device type, or None. Imported at first use, because that is slow."""
    try:
        if device == "cpu":
            from reparam.kernels import nf4_cpu

            return nf4_cpu
        if device == "cuda":
            from reparam.kernels import nf4_gpu

            return nf4_gpu
    except (ImportError, OSError):  # OSError: llvmlite is installed, but its shared library is missing
        return None
    return None


def backend(device: str = "cpu") -> str:
    """The backend for a device type: "numba" for "cpu", "triton" for "cuda", or "torch" if it cannot be imported."""
    return "torch" if _kernels(device) is None else {"cpu": "numba", "cuda": "triton"}[device]
