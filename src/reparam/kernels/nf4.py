"""NF4: sixteen levels for normally distributed weights, 4 bits an entry (Dettmers et al. 2023, arXiv 2305.14314, §3).

A matrix is flattened row by row and cut into blocks of `block` entries, which may cross rows; the last may be short.
A block keeps its largest magnitude c in float32, and each entry w the number of thresholds that w · (1/c) is above, a
tie going to the lower code. Two codes share a byte, the first in the high half; an odd count ends in a virtual zero.

    ŵ = CODE[index] · c

Double quantization stores c itself in eight bits: less the mean of all c, in blocks of 256, coded by a signed dynamic
map with a scale for each block. Bytes, statistics and order of operations are those of bitsandbytes 0.50 on CUDA,
except that a block of zeros gets the code of zero, as on its CPU.

These are the ops. `nf4_reference` is what they compute, in torch; `nf4_cpu` holds compiled kernels for a CPU, `nf4_gpu`
kernels in Triton. On every device the bytes are the reference's.

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
    """The entries of `w`, flattened, as codes uint8 [⌈n/2⌉] and magnitudes float32 [⌈n/block⌉].

    Finite values only: NaN and infinity are for the caller to refuse.

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
    """`count` entries [count] from block number `first` on, in `dtype`; computed in float32 and rounded once.

    Into `out`, contiguous, if given.

    >>> dequantize(torch.tensor([0xF0], dtype=torch.uint8), Statistics(torch.tensor([2.0])), block=64, count=2,
    ...            dtype=torch.bfloat16).tolist()
    [2.0, -2.0]
    """
    out = codes.new_empty(count, dtype=dtype) if out is None else out
    torch.ops.reparam.nf4_dequantize_.default(out, codes, *stats, block, first)
    return out


def compress_scales(absmax: Tensor) -> Statistics:
    """Double quantization of magnitudes, float32 [N]: eight bits each, and float32 for every 256.

    >>> stats = compress_scales(torch.tensor([0.5, 1.0]))
    >>> stats.absmax.tolist(), stats.offset.tolist()
    ([0, 255], [0.75])
    """
    return reference.compress_scales(absmax, torch.ops.reparam.nf4_nearest.default)


def few_rows(x: Tensor, codes: Tensor, stats: Statistics, block: int, shape: Sequence[int]) -> Tensor | None:
    """x [M, I] -> x Wᵀ [M, O] without unpacking W [O, I]; None where no kernel does that for so many rows."""
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
    assert out.is_contiguous()  # kernels go by addresses
    assert first * block + out.numel() <= 2 * codes.numel()
    stats = Statistics(absmax, nested, offset, map)
    kernels = _kernels(out.device.type) if out.dtype != torch.float64 else None
    if kernels is not None:
        kernels.dequantize(out, codes, stats, block, first)
        torch.autograd.graph.increment_version(out)  # the kernel writes where autograd cannot see it
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
    """The module of compiled kernels for this kind of device, or None. Imported at first use: it takes long."""
    try:
        if device == "cpu":
            from reparam.kernels import nf4_cpu

            return nf4_cpu
        if device == "cuda":
            from reparam.kernels import nf4_gpu

            return nf4_gpu
    except (ImportError, OSError):  # OSError: llvmlite is there and its library is not
        return None
    return None


def backend(device: str = "cpu") -> str:
    """What computes on this kind of device: "numba", "triton", or "torch" where neither can be imported."""
    return "torch" if _kernels(device) is None else {"cpu": "numba", "cuda": "triton"}[device]
