"""NF4: sixteen levels for normally distributed weights, 4 bits an entry (Dettmers et al. 2023, arXiv 2305.14314, §3).

A matrix is flattened row by row and cut into blocks of `block` entries, which may cross rows; the last may be short.
A block keeps its largest magnitude c in float32, and each entry w the number of thresholds that w · (1/c) is above, a
tie going to the lower code. Two codes share a byte, the first in the high half; an odd count ends in a virtual zero.

    ŵ = CODE[index] · c

Double quantisation stores c itself in eight bits: less the mean of all c, in blocks of 256, coded by a signed dynamic
map with a scale for each block. Bytes, statistics and order of operations are those of bitsandbytes 0.50 on CUDA,
except that a block of zeros gets the code of zero, as on its CPU.

The torch functions here are the reference. `nf4_cpu` holds compiled ones for a CPU, `nf4_gpu` ones in Triton; on every
device the bytes are the reference's.

Shapes: n entries, N blocks, M = ⌈N/256⌉ blocks of statistics.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from reparam.kernels.nf4_tables import CODE, DYNAMIC, NESTED_BLOCK, THRESHOLDS, TINY, Statistics


def compress(absmax: Tensor) -> Statistics:
    """Double quantisation of float32 absmax [N] (§3 "Double Quantization"); the nearest entry, a tie to the lower."""
    offset = absmax.mean()
    rest = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = rest.abs().amax(1)  # [M]
    scaled = rest * (1 / nested.clamp(min=TINY))[:, None]
    table = DYNAMIC.to(absmax.device)
    codes = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    return Statistics(codes.view(-1)[: len(absmax)].contiguous(), nested, offset.view(1))


def magnitudes(stats: Statistics, blocks: Tensor) -> Tensor:
    """The magnitudes of these blocks, integers [...], as float32 [...]."""
    found = stats.absmax[blocks]
    if stats.nested is None:
        return found
    assert stats.offset is not None
    table = DYNAMIC.to(found.device) if stats.map is None else stats.map
    return table[found.long()] * stats.nested[blocks // NESTED_BLOCK] + stats.offset


def expand(stats: Statistics) -> Tensor:
    """All magnitudes as float32 [N]."""
    return magnitudes(stats, torch.arange(len(stats.absmax), device=stats.absmax.device))


def quantize(w: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The entries of `w`, flattened, as codes uint8 [⌈n/2⌉] and magnitudes float32 [⌈n/block⌉].

    Finite values only: NaN and infinity are for the caller to refuse.

    >>> codes, absmax = quantize(torch.tensor([1.0, -1.0, 0.0, 0.5]), 64)
    >>> bytes(codes.tolist()).hex(), absmax.tolist()
    ('f07c', [1.0])
    """
    return torch.ops.reparam.nf4_quantize.default(w, block)


def dequantize(
    codes: Tensor, stats: Statistics, *, block: int, count: int, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """The first `count` entries [count] in `dtype`; computed in float32 and rounded once. Into `out`, if given.

    >>> dequantize(torch.tensor([0xF0], dtype=torch.uint8), Statistics(torch.tensor([2.0])), block=64, count=2,
    ...            dtype=torch.bfloat16).tolist()
    [2.0, -2.0]
    """
    out = codes.new_empty(count, dtype=dtype) if out is None else out
    torch.ops.reparam.nf4_dequantize_.default(out, codes, *stats, block)
    return out


def quantize_reference(w: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """What `quantize` must equal, byte for byte."""
    flat = w.detach().reshape(-1).float()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax.clamp(min=TINY))[:, None]).clamp_(-1, 1)
    index = torch.bucketize(scaled, THRESHOLDS.to(w.device), out_int32=True).view(-1).to(torch.uint8)
    index = index[: len(flat) + len(flat) % 2].view(-1, 2)
    return index[:, 0] << 4 | index[:, 1], absmax


def dequantize_reference(codes: Tensor, stats: Statistics, *, block: int, count: int, dtype: torch.dtype) -> Tensor:
    """What `dequantize` must equal, bit for bit."""
    index = torch.stack([codes >> 4, codes & 15], 1).view(-1)[:count]
    absmax = expand(stats).repeat_interleave(block)[:count]
    return (CODE.to(codes.device)[index.long()] * absmax).to(dtype)


# ---- the ops

_QUANTIZE, _DEQUANTIZE = "reparam::nf4_quantize", "reparam::nf4_dequantize_"
torch.library.define(
    _QUANTIZE, "(Tensor w, int block) -> (Tensor codes, Tensor absmax)", tags=torch.Tag.pt2_compliant_tag
)
torch.library.define(
    _DEQUANTIZE,
    "(Tensor(a!) out, Tensor codes, Tensor absmax, Tensor? nested, Tensor? offset, Tensor? map, int block) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(_QUANTIZE, "CompositeExplicitAutograd")
def _quantize(w: Tensor, block: int) -> tuple[Tensor, Tensor]:
    kernels = _kernels(w.device.type)
    if kernels is not None and w.dtype != torch.float64:
        return kernels.quantize(w.detach().contiguous(), block)
    return quantize_reference(w, block)


@torch.library.impl(_DEQUANTIZE, "CompositeExplicitAutograd")
def _dequantize(
    out: Tensor, codes: Tensor, absmax: Tensor, nested: Tensor | None, offset: Tensor | None, map: Tensor | None,
    block: int,
) -> None:  # fmt: skip
    stats = Statistics(absmax, nested, offset, map)
    kernels = _kernels(out.device.type)
    if kernels is not None and out.is_contiguous() and out.dtype != torch.float64:
        kernels.dequantize(out, codes, stats, block)
        torch.autograd.graph.increment_version(out)  # the kernel writes where autograd cannot see it
    else:
        flat = dequantize_reference(codes, stats, block=block, count=out.numel(), dtype=out.dtype)
        out.copy_(flat.view(out.shape))


@torch.library.register_fake(_QUANTIZE)
def _quantize_fake(w: Tensor, block: int) -> tuple[Tensor, Tensor]:
    codes = w.new_empty((w.numel() + 1) // 2, dtype=torch.uint8)
    return codes, w.new_empty((w.numel() + block - 1) // block, dtype=torch.float32)


@torch.library.register_fake(_DEQUANTIZE)
def _dequantize_fake(
    out: Tensor, codes: Tensor, absmax: Tensor, nested: Tensor | None, offset: Tensor | None, map: Tensor | None,
    block: int,
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
