"""Mixed batches: one more update, a bank of factor slots with one slot index per row of the batch.

Every update that has factors can be in it, on every storage. Row b of the batch uses slot s = slots[b], or, where that
is -1, the base alone:

    y[b] = gain[s] ∘ (W x[b]) + B[s] (A[s] x[b]) + bias[s]

Shapes: S slots, R the largest rank so far, B rows, T tokens in a row.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from reparam.core.base import Factors, Update, Weight
from reparam.kernels.rows import bank_update_


@dataclasses.dataclass
class Routing:
    """Which slot each row of the next batches uses; one object is shared by all banks of a model."""

    slots: Tensor  # [B] int64, -1 for the base
    tokens: int | None = None
    """Tokens in a row of the batch that is being computed, as the model's input has them."""

    def split(self, shape: torch.Size) -> tuple[int, int]:
        """Rows and tokens of an activation with this shape. Raises ValueError where rows cannot be told apart."""
        rows = len(self.slots)
        flat = shape[:-1].numel()
        known = shape[0] == rows or (len(shape) == 2 and self.tokens is not None and shape[0] == rows * self.tokens)
        if not known:
            raise ValueError(
                f"a mixed batch of {rows} rows met an activation of shape {list(shape)} whose rows it cannot tell "
                f"apart; select one adapter at a time for this model"
            )
        return rows, flat // rows


class Bank(Update):
    """Factors of many adapters at one site. Slots are written when they are first selected, not when loaded."""

    A: Tensor  # [S, R, I]
    B_t: Tensor  # [S, R, O]
    ranks: Tensor  # [S]
    gain: Tensor | None  # [S, O]
    bias: Tensor | None  # [S, O], what is added to the frozen bias

    def __init__(self, weight: Weight, routing: Routing) -> None:
        super().__init__()
        self.routing = routing
        empty = torch.zeros(0, 0, 0, dtype=weight.dtype, device=weight.device)
        self.register_buffer("A", empty.new_zeros(0, 0, weight.in_features), persistent=False)
        self.register_buffer("B_t", empty.new_zeros(0, 0, weight.out_features), persistent=False)
        self.register_buffer("ranks", torch.zeros(0, dtype=torch.int64, device=weight.device), persistent=False)
        self.register_buffer("gain", None, persistent=False)
        self.register_buffer("bias", None, persistent=False)

    @torch.no_grad()
    def write(self, slot: int, factors: Factors | None, bias: Tensor | None = None) -> None:
        """Fill a slot; None means that the adapter leaves this site alone. Grows by doubling."""
        rank = 0 if factors is None else len(factors.A)
        self._grow(slot + 1, rank)
        self.ranks[slot] = rank
        if factors is not None:
            self.A[slot, :rank] = factors.A
            self.B_t[slot, :rank] = factors.B.T
        gain = None if factors is None else factors.gain
        for name, value, fill in (("gain", gain, 1.0), ("bias", bias, 0.0)):
            table = getattr(self, name)
            if table is None and value is not None:
                table = self.A.new_full((len(self.A), self.B_t.shape[-1]), fill)
                setattr(self, name, table)
            if table is not None:
                table[slot] = fill if value is None else value

    def read(self, slot: int) -> tuple[Factors, Tensor | None]:
        """What is in a slot: its factors, and what is added to the frozen bias, or None."""
        gain = None if self.gain is None else self.gain[slot]
        bias = None if self.bias is None else self.bias[slot]
        return Factors(self.A[slot], self.B_t[slot].t(), gain), bias

    def forward(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [B, T, I] or [B·T, I] -> each row through its own adapter."""
        if torch.is_grad_enabled() and self.training:
            raise ValueError("a mixed batch is for inference: select one adapter to train it, or call model.eval()")
        rows, tokens = self.routing.split(x.shape)
        slots = self.routing.slots
        y = weight(x, None if self.gain is not None else bias)
        out = y.view(rows, tokens, -1)
        bank_update_(out, x.reshape(rows, tokens, -1), slots, self.A, self.B_t, self.ranks, self.gain)
        if self.gain is not None and bias is not None:
            out += bias
        if self.bias is not None:
            out += torch.where(slots[:, None] >= 0, self.bias[slots.clamp(min=0)], 0)[:, None]
        return y

    def rows(self, ids: Tensor, weight: Weight) -> Tensor:
        """ids [B, T] -> rows of each row's own matrix, [B, T, I]. Here O = V: `B_t` is looked up, A multiplied."""
        rows, tokens = self.routing.split(torch.Size((*ids.shape, 1)))
        slots = self.routing.slots
        y = weight.rows(ids)
        slot = slots.clamp(min=0)[:, None]
        ids = ids.reshape(rows, tokens)
        h = self.B_t.transpose(1, 2)[slot, ids]  # [B, T, R]
        gain = None
        if self.gain is not None:
            gain = torch.where(slots[:, None] >= 0, self.gain[slot, ids], 1)
            y = y * gain.view(*y.shape[:-1], 1)
        eye = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device).expand(len(self.A), -1, -1).contiguous()
        out = y.view(rows, tokens, -1)
        bank_update_(out, h, slots, eye, self.A, self.ranks, None)
        return y

    def _grow(self, slots: int, rank: int) -> None:
        have, width = self.A.shape[:2]
        if slots <= have and rank <= width:
            return
        count = max(have, 1 << (slots - 1).bit_length()) if slots > have else have
        for name in ("A", "B_t"):
            old = getattr(self, name)
            new = old.new_zeros(count, max(width, rank), old.shape[-1])
            new[:have, :width] = old
            setattr(self, name, new)
        self.ranks = torch.cat([self.ranks, self.ranks.new_zeros(count - have)])
        for name, fill in (("gain", 1.0), ("bias", 0.0)):
            old = getattr(self, name)
            if old is not None:
                setattr(self, name, torch.cat([old, old.new_full((count - have, old.shape[-1]), fill)]))
