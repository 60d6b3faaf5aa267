"""Measure how much ΔW amplifies directions in which W is small (LoRA's paper, arXiv 2106.09685, §7.3).

    amplification = |ΔW| / |Uᵀ W V|        U [O, r], V [I, r]: leading singular directions of ΔW; Frobenius norms

|Uᵀ W V| is the norm of W in these directions. Compare it with the norm of W in its own r leading directions and in
random directions. The paper's example is GPT-3, 48th layer, W_q, r = 4: |ΔW| = 6.91; the norm of W is 0.32 in the
directions of ΔW, 21.67 in its own and 0.02 in random ones; so the amplification is 21.5.

W is applied to r vectors at a time and never dequantized as a whole. Its leading directions come from the randomized
range finder in `operators.py`, so `top` is at most the true value. `random` is the root mean square over random
directions, r |W| / √(O I).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from reparam.core.base import Weight
from reparam.inspect.operators import leading, of_weight
from reparam.inspect.spectrum import Spectrum

DIRECTIONS = 8
"""Maximum number of directions if ΔW has full rank."""


class Amplification(NamedTuple):
    """Norms of one site's ΔW and of W in several sets of r directions."""

    r: int
    """Number of directions: the rank of ΔW, or at most `DIRECTIONS` if ΔW has full rank."""
    change: float
    """Frobenius norm of ΔW."""
    own: float
    """Norm of W in the leading directions of ΔW, |Uᵀ W V|."""
    random: float
    """Norm of W in random directions, as the root mean square: r |W| / √(O I)."""
    top: float
    """Norm of W in its own leading directions: √(σ_1² + ... + σ_r²)."""

    @property
    def factor(self) -> float | None:
        """Amplification |ΔW| / |Uᵀ W V|; None if W is zero in these directions."""
        return self.change / self.own if self.own else None


@torch.no_grad()
def amplification(change: Spectrum, weight: Weight) -> Amplification | None:
    """Compute the amplification of one site from the spectrum of ΔW and the frozen W; None if ΔW is zero."""
    r = min(change.rank, DIRECTIONS) if change.kind == "leading" else change.rank
    if not r:
        return None
    frozen = of_weight(weight)
    own = change.u[:, :r].T @ frozen.times(change.vh[:r].T)
    size = float(weight.squared_norms(1).sum().sqrt())
    rows, columns = frozen.shape
    top = leading(frozen, r)[1]
    return Amplification(
        r, change.energy**0.5, float(own.norm()), r * size / (rows * columns) ** 0.5, float(top.norm())
    )
