"""Matrices for NF4, and helpers that call its functions in sequence."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from reparam.kernels.nf4 import dequantize, quantize
from reparam.kernels.nf4_tables import BLOCKS, Statistics

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
WORST = 0.15191  # half the widest gap between two levels, that from -1 to -0.696
DYNAMIC_WORST = 0.007032  # half the widest gap of the dynamic map, or the whole one from -1 to its lowest entry
f32 = np.float32
blocks = st.sampled_from(BLOCKS)
shapes = st.tuples(st.integers(1, 40), st.integers(1, 150))
seeds = st.integers(0, 2**16)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def indices(codes: Tensor, count: int) -> list[int]:
    """The 4-bit codes of `count` entries."""
    return torch.stack([codes >> 4, codes & 15], 1).view(-1)[:count].tolist()


def dequantized(w: Tensor, block: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    """`w` quantized with plain statistics and back, in its shape."""
    codes, absmax = quantize(w, block)
    return dequantize(codes, Statistics(absmax), block=block, count=w.numel(), dtype=dtype).view(w.shape)


def largest(w: Tensor, block: int) -> Tensor:
    """For each entry, the largest magnitude of its block, by a naive loop."""
    flat = w.detach().float().reshape(-1)
    return torch.cat([part.abs().max().expand(len(part)) for part in flat.split(block)]).view(w.shape)
