"""NF4 in torch, for any device and dtype. The compiled kernels must give the same bytes.

Shapes: n entries, N blocks, M = ⌈N/256⌉ blocks of statistics.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from reparam.kernels.nf4_tables import CODE, DYNAMIC, NESTED_BLOCK, THRESHOLDS, TINY, Statistics


def nearest_code(scaled: Tensor) -> Tensor:
    """The index (uint8) of the level of the dynamic map nearest to each number; ties go to the lower level."""
    table = DYNAMIC.to(scaled.device)
    return torch.bucketize(scaled, (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8)


def compress_scales(absmax: Tensor, nearest: Callable[[Tensor], Tensor] = nearest_code) -> Statistics:
    """Double quantization of float32 absmax [N] (QLoRA, §3, "Double Quantization")."""
    offset = absmax.double().mean().float()  # a sum in float32 would depend on the number of threads
    rest = F.pad(absmax - offset, (0, -len(absmax) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = rest.abs().amax(1)  # [M]
    scaled = rest * (1 / nested.clamp(min=TINY))[:, None]
    return Statistics(nearest(scaled).view(-1)[: len(absmax)].contiguous(), nested, offset.view(1))


def magnitudes(stats: Statistics, blocks: Tensor) -> Tensor:
    """blocks, integers [...] -> the magnitudes of these blocks, float32 [...]."""
    found = stats.absmax[blocks]
    if stats.nested is None:
        return found
    assert stats.offset is not None
    table = DYNAMIC.to(found.device) if stats.map is None else stats.map
    return table[found.long()] * stats.nested[blocks // NESTED_BLOCK] + stats.offset


def expand(stats: Statistics) -> Tensor:
    """The magnitudes of all blocks, float32 [N]."""
    return magnitudes(stats, torch.arange(len(stats.absmax), device=stats.absmax.device))


def quantize_reference(w: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The reference for `nf4.quantize`, which must give the same bytes."""
    flat = w.detach().reshape(-1).float()
    blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax.clamp(min=TINY))[:, None]).clamp_(-1, 1)
    index = torch.bucketize(scaled, THRESHOLDS.to(w.device), out_int32=True).view(-1).to(torch.uint8)
    index = index[: len(flat) + len(flat) % 2].view(-1, 2)
    return index[:, 0] << 4 | index[:, 1], absmax


def dequantize_reference(codes: Tensor, stats: Statistics, *, block: int, count: int, dtype: torch.dtype) -> Tensor:
    """The reference for `nf4.dequantize` from block 0 on, which must give the same bits."""
    index = torch.stack([codes >> 4, codes & 15], 1).view(-1)[:count]
    absmax = expand(stats).repeat_interleave(block)[:count]
    return (CODE.to(codes.device)[index.long()] * absmax).to(dtype)
