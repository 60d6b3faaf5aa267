"""How an activation holds the rows of a mixed batch.

Shapes: B rows of the batch, T tokens in a row, N chunks.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeVar

from torch import Tensor

T = TypeVar("T", Tensor, tuple[int, ...])
Order = Literal["rows", "tokens"]
"""What comes first in an activation: rows, [B, T, ...] or [B·T, ...]; or tokens, [T, B, ...] or [T·B, ...]."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an activation holds the rows of the batch."""

    order: Order
    rows: int
    flat: bool
    """Whether its first dimension holds rows and tokens."""

    def by_row(self, x: Tensor) -> Tensor:
        """A view [B, T, ...] of an activation, or of the output that a module has for it."""
        if self.order == "rows":
            return x.unflatten(0, (self.rows, -1))
        return (x.unflatten(0, (-1, self.rows)) if self.flat else x).transpose(0, 1)

    def joined(self, rows: Tensor) -> Tensor:
        """Some rows [K, T, ...] as an activation in this order."""
        if self.order == "rows":
            return rows.flatten(0, 1)
        return rows.transpose(0, 1).flatten(0, 1) if self.flat else rows.transpose(0, 1)

    def chunks(self, x: Tensor) -> Tensor:
        """An activation as [N, T', I]: N parts in its own order, each of one row, without a copy if x is contiguous."""
        count = self.rows
        if self.order == "tokens":
            count = x.shape[0] if self.flat else x.shape[0] * x.shape[1]
        return x.reshape(count, x.shape[:-1].numel() // max(count, 1), x.shape[-1])

    def of_chunks(self, values: T, count: int) -> T:
        """Values of rows [B] as values of the `count` chunks, in a tensor or a tuple."""
        if self.order == "rows":
            return values[: self.rows]
        times = count // self.rows
        return values.repeat(times) if isinstance(values, Tensor) else values * times
