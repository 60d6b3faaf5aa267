"""How the random numbers of a projection are drawn: one hash of 64 bits for each of them, and where its bits go.

    word(i) = mix(key + (i + 1) · GOLDEN)        SplitMix64 (Steele, Lea & Flood 2014), modulo 2^64

Bit 0 is a sign, bits 1 to 13 are a normal number, the highest 24 bits are the place in an order. All of it is whole
numbers and one table, so that every machine draws the same. `VERSION` belongs to all of this, and to what is made of
it: a vector of an intrinsic space means nothing under another map.
"""

from __future__ import annotations

import torch

VERSION = 1
GOLDEN = 0x9E3779B97F4A7C15
MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
GAUSS_BITS = 12
"""Bits of the size of a normal number. With its sign, it is one of 8192 equally likely quantiles of N(0, 1)."""
ORDER_BITS = 24
"""Bits by which entries are sorted into a random order; entries with equal ones stay as they were."""
_HALF = 1 << GAUSS_BITS
QUANTILES = torch.special.ndtri(0.5 + (torch.arange(_HALF, dtype=torch.float64) + 0.5) / (2 * _HALF)).float()  # [4096]
