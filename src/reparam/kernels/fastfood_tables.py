"""The constants that generate a projection's random numbers: one 64-bit hash per entry, and the use of its bits.

    word(i) = mix(key + (i + 1) · GOLDEN)        SplitMix64 (Steele, Lea & Flood 2014), modulo 2^64

Bit 0 gives a sign, bits 1 to 13 a normal number, and the highest 24 bits a sort key for the permutation. Only integers
and one table are used, so every machine generates the same numbers. `VERSION` identifies this scheme and the map built
from it: a vector trained under one map is meaningless under another.
"""

from __future__ import annotations

import torch

VERSION = 1
GOLDEN = 0x9E3779B97F4A7C15
MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
GAUSS_BITS = 12
"""Bits for the magnitude of a normal number. With its sign, it is one of 8192 equally likely quantiles of N(0, 1)."""
ORDER_BITS = 24
"""Bits of the sort key that gives the random permutation; entries with equal keys keep their order."""
_HALF = 1 << GAUSS_BITS
QUANTILES = torch.special.ndtri(0.5 + (torch.arange(_HALF, dtype=torch.float64) + 0.5) / (2 * _HALF)).float()  # [4096]
