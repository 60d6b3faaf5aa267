"""What the compiled kernel of mixed batches is told of a step and of a bank, kept because many calls share it.

Shapes as in `rows`; R rows of a step.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Step:
    """Rows of any lengths that are end to end: row r has the tokens begins[r] to begins[r + 1], and the slot slots[r].

    It keeps the addresses, because many sites are computed for the same rows.
    """

    def __init__(self, begins: Tensor, slots: Tensor) -> None:
        self.begins = begins  # [R + 1] int64
        self.slots = slots  # [R] int64, -1 for no adapter
        self.total = int(begins[-1])
        self.addresses = (begins.data_ptr(), slots.data_ptr())
        self.sizes = (len(slots), -(-self.total // max(len(slots), 1)))


class Tables:
    """The tables of a bank, with what the kernel needs to know of them. They must stay where they are."""

    def __init__(self, A: Tensor, B_t: Tensor, spans: Tensor, gain: Tensor) -> None:
        self.all = (A, B_t, spans, gain)
        self.addresses = tuple(tensor.data_ptr() for tensor in self.all)
        self.widths = (A.shape[1], B_t.shape[1])
        self.sizes = (*self.widths, len(spans), len(A), len(B_t), len(gain))
        single = all(table.dtype is torch.float32 and table.device.type == "cpu" for table in (A, B_t, gain))
        self.compiled = single and all(table.is_contiguous() for table in self.all)
