"""Blockwise 8-bit quantization: one byte per element and one float32 scale per block of 256 (arXiv 2110.02861).

A block's values are divided by their largest magnitude, and each is replaced by the index of the nearest level of the
*dynamic map* (arXiv 1511.04561; not E4M3). The map has seven decades, each with twice as many levels as the one below.
For e = 0..6 the magnitudes are the midpoints of `linspace(0.1, 1, n + 1)` times 10^(e-6), with n = 2^e for the signed
map and n = 2^(e+1) for the unsigned one; both also have 0 and 1. Shapes: N blocks of 256 elements.

Ties go to the lower level, but the unsigned map never rounds a value above 0 to 0. It stores AdamW's second moments, by
whose root the step is divided: if a gradient is 3000 times smaller than the largest of its block, its square is less
than half of the first level, and rounding it to 0 would make AdamW divide the step by eps alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256
_BUCKETS = 1 << 16  # one per upper half of a float32: sign, exponent, 7 bits of the mantissa


def dynamic_map(*, signed: bool) -> Tensor:
    """The 256 levels in ascending order, float32 [256] on the CPU. On any machine they equal those of bitsandbytes.

    The signed map covers -0.993 to 1, the unsigned map 0 to 1.

    >>> dynamic_map(signed=False)[[0, 1, 254, 255]]
    tensor([0.0000e+00, 3.2500e-07, 9.9648e-01, 1.0000e+00])
    """
    decades = []
    for e in range(7):
        edges = _linspace(2**e if signed else 2 ** (e + 1))
        decades.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (e - 6))
    magnitudes = torch.cat(decades)
    both = [-magnitudes, magnitudes] if signed else [magnitudes]
    return torch.cat([*both, torch.tensor([0.0, 1.0])]).sort().values


class Codebook(NamedTuple):
    """A map with tables that find the nearest level in two lookups, where a binary search would take eight steps.

    A bucket holds the float32 numbers with the same upper 16 bits. At most one threshold between levels is in a bucket,
    so the level of a number is that of the bucket's smallest number or the next one.
    """

    levels: Tensor  # [256] float32
    lowest: Tensor  # [65536] uint8, the level of each bucket's smallest number
    threshold: Tensor  # [65536] float32; numbers of the bucket above it have the next level


def codebook(*, signed: bool, device: torch.device | str = "cpu") -> Codebook:
    """The codebook of the signed map (for first moments) or of the unsigned map (for second moments).

    >>> codebook(signed=True).levels[127].item()
    0.0
    """
    levels = dynamic_map(signed=signed)
    thresholds = (levels[:-1] + levels[1:]) / 2
    if not signed:
        thresholds[0] = 0.0
    upper = torch.arange(-_BUCKETS // 2, _BUCKETS // 2, dtype=torch.int32) << 16
    smallest = torch.where(upper < 0, upper | 0xFFFF, upper).view(torch.float32)
    lowest = torch.bucketize(smallest, thresholds)
    threshold = torch.cat([thresholds, torch.tensor([torch.inf])])[lowest]
    return Codebook(levels.to(device), lowest.to(device, torch.uint8), threshold.to(device))


def quantize(values: Tensor, book: Codebook) -> tuple[Tensor, Tensor]:
    """Quantize float32 values [N, 256] to uint8 codes [N, 256] and float32 scales [N, 1].

    The scale of a block is its largest magnitude, at least 1.2e-38. A value that is not finite corrupts only its own
    block.

    >>> codes, scales = quantize(torch.linspace(-1, 3, 256)[None], codebook(signed=True))
    >>> scales.item(), codes[0, 255].item()
    (3.0, 255)
    """
    scales = values.abs().amax(dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
    scaled = (values / scales).view(-1)
    bucket = (scaled.view(torch.int32) >> 16).add_(_BUCKETS // 2)
    codes = book.lowest.index_select(0, bucket)
    codes += scaled > book.threshold.index_select(0, bucket)
    return codes.view_as(values), scales


def dequantize(codes: Tensor, scales: Tensor, book: Codebook) -> Tensor:
    """The float32 values [N, 256] of uint8 codes [N, 256] and scales [N, 1].

    >>> book = codebook(signed=False)
    >>> dequantize(torch.tensor([[0, 255]], dtype=torch.uint8), torch.tensor([[2.0]]), book)
    tensor([[0., 2.]])
    """
    return book.levels.index_select(0, codes.reshape(-1).int()).view(codes.shape).mul_(scales)


def _linspace(steps: int) -> Tensor:
    """`torch.linspace(0.1, 1, steps + 1)` as computed with fused multiply-add; without it, torch can be 1 ulp off."""
    start, end = torch.tensor(0.1), torch.tensor(1.0)
    step = ((end - start) / steps).double()
    index = torch.arange(steps + 1, dtype=torch.float64)
    rising, falling = start.double() + step * index, end.double() - step * (steps - index)
    return torch.where(index < (steps + 1) // 2, rising, falling).float()
