"""Mixed batches: a bank holds the factors of several adapters, and each row of a batch uses one of its slots.

A bank can hold every update that has factors, on any storage. Row b of the batch uses slot s = slots[b], or only the
base model if slots[b] is -1:

    y[b] = gain[s] ∘ (W x[b]) + B[s] (A[s] x[b]) + bias[s]

Shapes: S slots, R largest rank so far, B rows of the batch, T tokens in a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reparam.core.base import Factors, Update, Weight
from reparam.kernels.rows import bank_update_
from reparam.sites.routing import Routing


class Bank(Update):
    """The factors of several adapters at one site. A slot is written when its adapter is first selected."""

    A: Tensor  # [S, R, I]
    B_t: Tensor  # [S, R, O]
    ranks: Tensor  # [S]
    gain: Tensor | None  # [S, O]
    bias: Tensor | None  # [S, O], added to the frozen bias

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
        """Fill a slot. `factors=None` means that the adapter does not change this site's weight.

        The number of slots grows by doubling.
        """
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
        """The factors in a slot, and the change of the frozen bias [O] or None."""
        gain = None if self.gain is None else self.gain[slot]
        bias = None if self.bias is None else self.bias[slot]
        return Factors(self.A[slot], self.B_t[slot].t(), gain), bias

    def forward(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [B, T, I] or [B·T, I] -> the output of each row under its own adapter, [..., O]."""
        if torch.is_grad_enabled() and self.training:
            raise ValueError("a mixed batch is for inference: select one adapter to train it, or call model.eval()")
        if self.routing.trial is not None:
            self.routing.trial.see(self, x)
            return weight(x, bias)
        layout = self.routing.layout(self, x.shape)
        y = weight(x, None if self.gain is not None else bias).contiguous()
        out = layout.chunks(y)  # a view
        slots = layout.of_chunks(self.routing.slots, len(out))
        bank_update_(out, layout.chunks(x), slots, self.A, self.B_t, self.ranks, self.gain)
        if self.gain is not None and bias is not None:
            out += bias
        if self.bias is not None:
            out += torch.where(slots[:, None] >= 0, self.bias[slots.clamp(min=0)], 0)[:, None]
        return y

    def rows(self, ids: Tensor, weight: Weight) -> Tensor:
        """ids [B, T] -> embeddings [B, T, I], each row with its own adapter's W'. O = V: ids index `B_t`."""
        y = weight.rows(ids)
        if self.routing.trial is not None:
            self.routing.trial.see(self, ids)
            return y
        layout = self.routing.layout(self, torch.Size((*ids.shape, 1)))
        out = layout.chunks(y)
        slots = layout.of_chunks(self.routing.slots, len(out))
        slot = slots.clamp(min=0)[:, None]
        ids = ids.reshape(out.shape[:2])
        h = self.B_t.transpose(1, 2)[slot, ids]  # [B, T, R]
        if self.gain is not None:
            out *= torch.where(slots[:, None] >= 0, self.gain[slot, ids], 1).unsqueeze(2)
        eye = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device).expand(len(self.A), -1, -1).contiguous()
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
