"""The update in one slot of a bank by itself, for sites whose rows come sorted by slot: those of experts.

Shapes: N rows, R rank, O out_features, I in_features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reparam.core.base import Weight

BANK = "*"
"""The key of a site's bank among its updates. It is not a valid adapter name, so it cannot collide."""


class Held(NamedTuple):
    """What a slot holds: rows of the bank's tables, as views."""

    A: Tensor  # [R, I]; the change itself, [O, I], if there is no B
    B_t: Tensor | None  # [R, O]
    gain: Tensor | None  # [O]

    def product(self) -> tuple[Tensor, Tensor, float] | None:
        """A [R, I], B [O, R] and 1, or None if the slot holds a gain or a matrix."""
        return None if self.B_t is None or self.gain is not None else (self.A, self.B_t.t(), 1.0)

    def __call__(self, x: Tensor, weight: Weight) -> Tensor:
        """x [N, I] -> x W'ᵀ [N, O]."""
        y = weight(x)
        if self.gain is not None:
            y = y * self.gain.to(y.dtype)
        h = x.to(self.A.dtype) @ self.A.t()
        return y + (h if self.B_t is None else h @ self.B_t).to(y.dtype)


def product_of(B: Tensor, A: Tensor, dtype: torch.dtype) -> Tensor:
    """B A [O, I] of factors of which one can be an identity, which then costs no product; exact enough for `dtype`."""
    for factor, other in ((A, B), (B, A)):
        if factor.shape[0] == factor.shape[1] and torch.equal(factor, torch.eye(len(factor)).to(factor)):
            return other
    dtype = torch.promote_types(torch.promote_types(A.dtype, dtype), torch.float32)
    return B.to(dtype) @ A.to(dtype)
