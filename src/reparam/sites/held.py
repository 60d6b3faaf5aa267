"""The update in one slot of a bank by itself, for sites whose rows come sorted by slot: those of experts.

Shapes: N rows, R rank, O out_features, I in_features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from reparam.core.base import Weight
    from reparam.sites.bank import Bank

BANK = "*"
"""The key of a site's bank among its updates. It is not a valid adapter name, so it cannot collide."""


class Held:
    """The update in one slot of a bank, by itself: of an expert, whose rows come sorted."""

    def __init__(self, bank: Bank, slot: int) -> None:
        self._bank, self._slot = bank, slot

    def product(self) -> tuple[Tensor, Tensor, float] | None:
        """A [R, I], B [O, R] and 1, or None if the slot holds a gain or a matrix."""
        bank, (a, b, gain) = self._bank, self._places()
        return (bank.A[a.start : a.stop], bank.B_t[b.start : b.stop].t(), 1.0) if len(b) and not gain else None

    def __call__(self, x: Tensor, weight: Weight) -> Tensor:
        """x [N, I] -> x W'ᵀ [N, O]."""
        bank, (a, b, gain) = self._bank, self._places()
        y = weight(x)
        if gain:
            y = y * bank.gain[gain.start].to(y.dtype)
        if a:
            h = x.to(bank.A.dtype) @ bank.A[a.start : a.stop].t()
            y = y + (h @ bank.B_t[b.start : b.stop] if b else h).to(y.dtype)
        return y

    def _places(self) -> list[range]:
        return [self._bank.places[name].of(self._slot) for name in ("A", "B_t", "gain")]
