"""How an activation holds the rows of a mixed batch.

In a packed batch, the rows have lengths of their own and are end to end: an activation is [1, N, ...] or [N, ...] for N
tokens in all.

Shapes: B rows of the batch, T tokens in a row, K some of the rows, C chunks.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Order = Literal["rows", "tokens", "packed", "shared"]
"""What comes first in an activation: rows, [B, T, ...] or [B·T, ...]; or tokens, [T, B, ...] or [T·B, ...]; or
"packed", if the rows are end to end; or "shared", if rows come first or all rows use the same input, [1, T, ...] or
[T, ...], such as positions."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an activation holds the rows of the batch."""

    order: Order
    rows: int
    flat: bool
    """Whether its first dimension holds rows and tokens."""
    lengths: tuple[int, ...] = ()
    """The tokens of each row of a packed batch."""
    shared: bool = False
    """Whether all rows may use the same input."""

    def parts(
        self, y: Tensor, x: Tensor, slots: Tensor, numbers: tuple[int, ...]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, tuple[int, ...]]]:
        """An output and its input [..., I] in parts: chunks [C, T', I] of one row each, and their slots [C].

        The chunks of `y`, which is contiguous, are views. `slots` are those of the rows, and `numbers` the same.
        """
        if self.order == "packed":
            at = row = 0
            y, x = (t.reshape(sum(self.lengths), -1, t.shape[-1]) for t in (y, x))
            for length, group in itertools.groupby(self.lengths):
                count = len(list(group))
                out, h = (t[at : at + count * length].view(count, -1, t.shape[-1]) for t in (y, x.contiguous()))
                yield out, h, slots[row : row + count], numbers[row : row + count]
                at, row = at + count * length, row + count
            return
        count = self.rows
        if count != len(numbers):
            slots, numbers = slots[:count], numbers[:count]
        if self.order == "tokens":
            count = x.shape[0] if self.flat else x.shape[0] * x.shape[1]
            slots, numbers = slots.repeat(count // self.rows), numbers * (count // self.rows)
        length = x.shape[:-1].numel() // max(count, 1)
        yield y.reshape(count, length, y.shape[-1]), x.reshape(count, length, x.shape[-1]), slots, numbers

    def pick(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        """Some rows of an activation, in the same order of dimensions."""
        if self.order == "packed":
            return x.index_select(0 if self.flat else 1, self.tokens(rows, x.device))
        return self._joined(self._by_row(x)[list(rows)])

    def rows_of_tokens(self, count: int, device: torch.device) -> Tensor:
        """The row of each of the tokens [count] of a flat activation."""
        if self.order == "packed":
            lengths = torch.tensor(self.lengths, device=device)
            return torch.arange(len(self.lengths), device=device).repeat_interleave(lengths, output_size=count)
        rows, tokens = torch.arange(self.rows, device=device), count // self.rows
        return rows.repeat(tokens) if self.order == "tokens" else rows.repeat_interleave(tokens)

    def merge(self, outputs: Sequence[Any], rows: Sequence[Sequence[int]]) -> Any:
        """The output for all rows, given one for each group of rows; each is a tensor, or a tuple of tensors.

        Raises ValueError if the output for rows that are end to end does not hold one entry for each token.
        """
        if isinstance(outputs[0], tuple):
            return tuple(self.merge(parts, rows) for parts in zip(*outputs, strict=True))
        device = outputs[0].device
        if self.order == "packed":
            dim = 0 if self.flat else 1
            tokens = [self.tokens(own, device) for own in rows]
            if any(y.ndim <= dim or y.shape[dim] != len(own) for y, own in zip(outputs, tokens, strict=True)):
                raise ValueError(
                    f"a module that adapters train in full makes {list(outputs[0].shape)} of {len(tokens[0])} tokens "
                    f"that are end to end, so its output does not belong to tokens; select one name per row instead "
                    f"of spans"
                )
            return torch.cat(list(outputs), dim).index_select(dim, torch.cat(tokens).argsort())
        parts = [dataclasses.replace(self, rows=len(own))._by_row(y) for own, y in zip(rows, outputs, strict=True)]
        return self._joined(torch.cat(parts)[torch.tensor(list(itertools.chain(*rows)), device=device).argsort()])

    def _by_row(self, x: Tensor) -> Tensor:
        """A view [B, T, ...] of an activation."""
        if self.order == "rows":
            return x.unflatten(0, (self.rows, -1))
        return (x.unflatten(0, (-1, self.rows)) if self.flat else x).transpose(0, 1)

    def _joined(self, rows: Tensor) -> Tensor:
        """Rows [K, T, ...] as an activation in this order."""
        if self.order == "rows":
            return rows.flatten(0, 1)
        return rows.transpose(0, 1).flatten(0, 1) if self.flat else rows.transpose(0, 1)

    def tokens(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """The places of the tokens of these rows of a packed batch."""
        ends = list(itertools.accumulate(self.lengths))
        return torch.cat([torch.arange(ends[row] - self.lengths[row], ends[row], device=device) for row in rows])


def for_each_row(y: Tensor, rows: int) -> Tensor:
    """An output [1, T, ...] or [T, H] that all rows share as [B, T, ...], a view; one of rows is returned as it is.

    Raises ValueError if its first dimension is neither 1 nor the number of rows.
    """
    y = y.unsqueeze(0) if y.ndim < 3 else y
    if y.shape[0] not in (1, rows):
        raise ValueError(f"its first dimension is {y.shape[0]}, which is neither 1 nor the number of rows, {rows}")
    return y.expand(rows, *y.shape[1:])


def groups(values: Sequence[Any]) -> dict[Any, list[int]]:
    """The rows that have the same value, by value.

    >>> groups(["a", None, "a"])
    {'a': [0, 2], None: [1]}
    """
    found: dict[Any, list[int]] = {}
    for row, value in enumerate(values):
        found.setdefault(value, []).append(row)
    return found
