"""How much ΔW amplifies directions that W has little of (LoRA's paper, arXiv 2106.09685, §7.3).

    amplification = |ΔW| / |Uᵀ W V|        U [O, r], V [I, r]: ΔW's leading singular directions, Frobenius norms

|Uᵀ W V| is how much of W lies in those directions. It is to be read against two other sizes: what the r leading
directions of W itself hold, and what random ones do. The paper's adapter of GPT-3 (48th layer, W_q, r = 4) has
|ΔW| = 6.91 against 0.32 in its own directions, 21.67 in W's leading ones and 0.02 in random ones: 21.5 times.

W is applied to r vectors, and never dequantized as a whole. Its leading directions are found by the randomized range
finder of `operators.py`, so that `top` is at most the true value; `random` is the root of the expected square,
r |W| / √(O I).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from reparam.core.base import Weight
from reparam.inspect.operators import leading, of_weight
from reparam.inspect.spectrum import Spectrum

DIRECTIONS = 8
"""How many directions at most, where ΔW has full rank."""


class Amplification(NamedTuple):
    """One site's ΔW against its W."""

    r: int
    """How many directions were taken: the rank of ΔW, or `DIRECTIONS` where that is full."""
    change: float
    """|ΔW|."""
    own: float
    """|Uᵀ W V| in ΔW's leading directions."""
    random: float
    """The same in random directions, as the root of the expected square."""
    top: float
    """The same in W's leading directions: √(σ_1² + ... + σ_r²)."""

    @property
    def factor(self) -> float | None:
        """The amplification; None where W has nothing in these directions."""
        return self.change / self.own if self.own else None


@torch.no_grad()
def amplification(change: Spectrum, weight: Weight) -> Amplification | None:
    """The amplification of one site; None without a change."""
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
