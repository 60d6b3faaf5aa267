"""Mixed batches: a bank holds the factors of several adapters, and each row of a batch uses one of its slots.

A bank can hold every update that has factors, on any storage. Row b of the batch uses slot s = slots[b], or only the
base model if slots[b] is -1:

    y[b] = gain[s] ∘ (W x[b]) + B[s] (A[s] x[b]) + bias[s]

A slot takes as much memory as its own factors: they are end to end in tables, and `spans` tells where each slot has its
own. Factors that are larger than their product, such as those of a change of full rank, are kept as the matrix B·A
instead, as O rows in the table A.

Shapes: S slots, R rank of a slot, M rows of a table, B rows of the batch, T tokens in a row, C chunks of one row each.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reparam.core.base import Factors, Update, Weight
from reparam.kernels.packs import Tables
from reparam.kernels.rows import bank_update_, packed_update_
from reparam.sites.held import Held, product_of
from reparam.sites.layout import Layout, for_each_row, groups
from reparam.sites.places import Places
from reparam.sites.routing import Routing

TABLES = ("A", "B_t", "gain", "bias")
INDEX = ("spans", "biased")
SLACK = 16
"""A table that grows gets one more free row for each `SLACK` rows in use, so that most writes copy nothing else."""


class InUse(NamedTuple):
    """What the slots of a batch need."""

    most: int  # the largest rank
    scaled: bool
    biased: bool
    dense: tuple[int, ...]  # the slots that hold a matrix


class Bank(Update):
    """The factors of several adapters at one site. A slot is written when its adapter is first selected."""

    A: Tensor  # [M, I], factors A [R, I], and matrices [O, I]
    B_t: Tensor  # [M, O]
    gain: Tensor  # [M, O]
    bias: Tensor  # [M, O], added to the frozen bias
    spans: Tensor  # [S, 4]: first row in A, first row in B_t, rank, row in gain or -1
    biased: Tensor  # [S]: row in bias or -1

    def __init__(self, weight: Weight, routing: Routing) -> None:
        super().__init__()
        self.routing = routing
        self.places = {name: Places() for name in TABLES}
        self._kept: tuple[frozenset[int], InUse] | None = None
        self._ready: Tables | None = None
        for name in TABLES:
            width = weight.in_features if name == "A" else weight.out_features
            self._hold(name, torch.zeros(0, width, dtype=weight.dtype, device=weight.device))
        self._hold("spans", torch.zeros(0, 4, dtype=torch.int64, device=weight.device))
        self._hold("biased", torch.zeros(0, dtype=torch.int64, device=weight.device))

    def write(
        self,
        slot: int,
        factors: Factors | None,
        bias: Tensor | None = None,
        exact: bool = False,
        more: int = 0,
    ) -> None:
        """Fill a slot. `factors=None` means that the adapter does not change this site's weight.

        Free rows are used first. If there are not enough together, the table is copied into a larger one, with some
        free rows, at least those for `more` slots of the smallest size; or, if `exact`, with none.
        """
        # A later write, outside of inference mode, changes the same tensors.
        with torch.inference_mode(False), torch.no_grad():
            self._release(slot)
            for name, rows in self._contents(factors, bias).items():
                self._put(name, slot, rows, exact, more)
            self._note(slot)

    def has_room(self, slot: int, factors: Factors | None, bias: Tensor | None) -> bool:
        """Whether a slot that is empty can be filled with these contents without moving or replacing a table."""
        sizes = self._sizes(factors, bias)
        return slot < len(self.spans) and all(self.places[name].has_room(rows) for name, rows in sizes.items())

    def twin(self) -> Bank:
        """A bank with the same contents, to take the place of this one after a slot of it has been written.

        This one can be used until then: nothing that its slots hold is changed. Tables are shared until they grow.
        """
        made = copy.copy(self)
        made._buffers = {name: held.clone() if name in INDEX else held for name, held in self._buffers.items()}  # type: ignore[union-attr]
        made.places = copy.deepcopy(self.places)
        return made

    def free(self, slot: int) -> None:
        """Empty a slot. Its rows can be used again."""
        with torch.inference_mode(False), torch.no_grad():
            self._release(slot)
            self._note(slot)

    def trim(self, most: float = 0.0) -> None:
        """Give the free rows of a table back, if they are more than the share `most` of it."""
        with torch.inference_mode(False), torch.no_grad():
            for name, places in self.places.items():
                if places.size - places.used > most * places.size:
                    self._move(name, places.used)

    @property
    def nbytes(self) -> int:
        """The bytes of the tables, with their free rows."""
        return sum(places.size * self._row_bytes(name) for name, places in self.places.items())

    def bytes_of(self, slot: int) -> int:
        """The bytes that a slot takes."""
        return sum(len(places.of(slot)) * self._row_bytes(name) for name, places in self.places.items())

    def bytes_for(self, factors: Factors | None, bias: Tensor | None) -> int:
        """The bytes that a slot with these contents would take."""
        return sum(rows * self._row_bytes(name) for name, rows in self._sizes(factors, bias).items())

    def held(self, slot: int) -> Held | None:
        """The update in a slot, as views; None if it does not change the weight."""
        a, b, gain = (self.places[name].of(slot) for name in ("A", "B_t", "gain"))
        if not a and not gain:
            return None
        B_t = self.B_t[b.start : b.stop] if b or not a else None
        return Held(self.A[a.start : a.stop], B_t, self.gain[gain.start] if gain else None)

    def changed(self, slot: int, w: Tensor) -> Tensor:
        """W' [O, I] of a slot, given W."""
        a, b, scale = (self.places[name].of(slot) for name in ("A", "B_t", "gain"))
        kept = w * self.gain[scale.start].to(w.dtype)[:, None] if scale else w
        own = self.A[a.start : a.stop].to(w.dtype)
        if a and not b:
            return kept + own
        return torch.addmm(kept, self.B_t[b.start : b.stop].t().to(w.dtype), own)

    def bias_change(self, slot: int) -> Tensor | None:
        """The change of the frozen bias [O], or None."""
        row = self.places["bias"].of(slot)
        return self.bias[row.start] if row else None

    def forward(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [B, T, I] or [B·T, I] -> the output of each row under its own adapter, [..., O]."""
        if torch.is_grad_enabled() and self.training:
            raise ValueError("a mixed batch is for inference: select one adapter to train it, or call model.eval()")
        routing = self.routing
        if routing.trial is not None:
            routing.trial.see(self, x)
            return weight(x, bias)
        layout = routing.layout(self, x.shape)
        use = self._in_use()
        y = weight(x, None if use.scaled else bias).contiguous()
        if layout.order == "packed" and not use.biased:
            x = x.contiguous()
            if packed_update_(y, x, routing.step, self._tables(), use.most):
                if use.dense:
                    self._add_dense(use.dense, y, x)
                return y if bias is None or not use.scaled else y.add_(bias)
        for out, h, slots, numbers in layout.parts(y, x, self.routing.slots, self.routing.slot_list):
            self._update(use, out, h, slots, numbers)
            if use.scaled and bias is not None:
                out += bias
            if use.biased:
                row = torch.where(slots >= 0, self.biased[slots.clamp(min=0)], -1)
                out += torch.where(row[:, None] >= 0, self.bias[row.clamp(min=0)], 0)[:, None]
        return y

    def _tables(self) -> Tables:
        """The tables for the compiled kernel, as long as they are the same tensors."""
        held: dict[str, Any] = self._buffers  # nn.Module's attribute lookup takes longer than a call of the kernel
        A, B_t, spans, gain = held["A"], held["B_t"], held["spans"], held["gain"]
        kept = self._ready
        if kept is None or not (
            kept.all[0] is A and kept.all[1] is B_t and kept.all[2] is spans and kept.all[3] is gain
        ):
            kept = self._ready = Tables(A, B_t, spans, gain)
        return kept

    def _add_dense(self, slots: tuple[int, ...], y: Tensor, x: Tensor) -> None:
        """Add the products of slots that hold a matrix, for rows that are end to end."""
        routing, out, h = self.routing, y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        layout, rows = Layout("packed", len(routing.slot_list), True, routing.packed or ()), groups(routing.slot_list)
        for slot in slots:
            tokens, a = layout.tokens(rows[slot], y.device), self.places["A"].of(slot)
            out.index_add_(0, tokens, h.index_select(0, tokens) @ self.A[a.start : a.stop].t())

    def _update(self, use: InUse, y: Tensor, x: Tensor, slots: Tensor, numbers: tuple[int, ...]) -> None:
        """Scale y [C, T, O] and add the products with x [C, T, I], in place."""
        if use.most or use.scaled:
            bank_update_(y, x, slots, self.A, self.B_t, self.spans, use.most, self.gain)
        for slot, chunks in groups(numbers).items() if use.dense else ():
            if slot in use.dense:
                rows, a = torch.tensor(chunks, device=y.device), self.places["A"].of(slot)
                own = x.index_select(0, rows).to(self.A.dtype) @ self.A[a.start : a.stop].t()
                y.index_copy_(0, rows, (y.index_select(0, rows) + own).to(y.dtype))

    def rows(self, ids: Tensor, weight: Weight) -> Tensor:
        """ids [B, T] -> embeddings [B, T, I], each row with its own adapter's W'. O = V: ids index rows of W.

        Rows can share their ids, [1, T] or [T], such as those of positions.
        """
        y = weight.rows(ids)
        if self.routing.trial is not None:
            self.routing.trial.see(self, ids)
            found: Tensor = self.routing.trial.output(self, y)
            return found
        layout = self.routing.layout(self, torch.Size((*ids.shape, 1)))
        if layout.shared:
            y = for_each_row(y, layout.rows).contiguous()
            ids = ids.expand(y.shape[:-1])
        for out, own, _, numbers in layout.parts(y, ids.unsqueeze(-1), self.routing.slots, self.routing.slot_list):
            for slot, chunks in groups(numbers).items():
                if slot >= 0:
                    rows = torch.tensor(chunks, device=y.device)
                    new = self._looked_up(slot, own.squeeze(-1).index_select(0, rows), out.index_select(0, rows))
                    out.index_copy_(0, rows, new.to(out.dtype))
        return y

    def _looked_up(self, slot: int, ids: Tensor, base: Tensor) -> Tensor:
        """The embeddings of W' for these ids [C, T], given those of W [C, T, I]."""
        a, b, scale = (self.places[name].of(slot) for name in ("A", "B_t", "gain"))
        kept = base * self.gain[scale.start][ids].unsqueeze(-1) if scale else base
        if not a:
            return kept
        return kept + (self.B_t[b.start : b.stop].t()[ids] @ self.A[a.start : a.stop] if b else self.A[a.start + ids])

    def _in_use(self) -> InUse:
        """What the slots of the batch need; computed again after a write and for other slots."""
        used, kept = self.routing.used, self._kept  # another thread may write a slot meanwhile
        if kept is None or (kept[0] is not used and kept[0] != used):
            down, up, gain, bias = (self.places[name].by_slot for name in TABLES)
            low = used & up.keys()
            kept = self._kept = (
                used,
                InUse(
                    most=max([len(up[slot]) for slot in low], default=0),
                    scaled=not used.isdisjoint(gain),
                    biased=not used.isdisjoint(bias),
                    dense=tuple(sorted((used & down.keys()) - low)),
                ),
            )
        return kept[1]

    def _sizes(self, factors: Factors | None, bias: Tensor | None) -> dict[str, int]:
        """How many rows of each table these contents need."""
        sizes = dict.fromkeys(TABLES, 0) | {"bias": int(bias is not None)}
        if factors is not None:
            rank, inputs, outputs = len(factors.A), self.A.shape[1], self.B_t.shape[1]
            dense = rank * (inputs + outputs) > inputs * outputs
            sizes |= {"A": outputs if dense else rank, "B_t": 0 if dense else rank}
            sizes["gain"] = int(factors.gain is not None and not bool((factors.gain == 1).all()))
        return sizes

    def _contents(self, factors: Factors | None, bias: Tensor | None) -> dict[str, Tensor]:
        """The rows of each table that hold these contents."""
        sizes, found = self._sizes(factors, bias), dict[str, Tensor]()
        if factors is not None:
            A, B, gain = factors
            if sizes["B_t"]:
                found |= {"A": A, "B_t": B.t()}
            elif sizes["A"]:
                found["A"] = product_of(B, A, self.A.dtype)
            if sizes["gain"] and gain is not None:
                found["gain"] = gain[None]
        return found if bias is None else found | {"bias": bias[None]}

    def _put(self, name: str, slot: int, rows: Tensor, exact: bool, more: int) -> None:
        places = self.places[name]
        place = places.take(slot, len(rows))
        if place is None:
            needed = places.used + len(rows)
            least = min([len(rows), *map(len, places.by_slot.values())])
            self._move(name, needed if exact else needed + max(needed // SLACK, more * least))
            place = places.take(slot, len(rows))
            assert place is not None
        getattr(self, name)[place.start : place.stop] = rows

    def _move(self, name: str, size: int) -> None:
        """Copy what slots hold of a table into a table of `size` rows."""
        old = getattr(self, name)
        new = old.new_empty(size, old.shape[1])  # the system gives a CPU the memory of a row when it is written
        for before, after in self.places[name].pack(size):
            new[after.start : after.stop] = old[before.start : before.stop]
        self._hold(name, new)
        for slot in range(len(self.spans)):
            self._note(slot)

    def _note(self, slot: int) -> None:
        """Note in `spans` and `biased` where the slot has its rows."""
        self._kept = None
        new = slot + 1 - len(self.spans)
        if new > 0:
            self._hold("spans", torch.cat([self.spans, self.spans.new_tensor(new * [[0, 0, 0, -1]])]))
            self._hold("biased", torch.cat([self.biased, self.biased.new_full((new,), -1)]))
        a, b, gain, bias = (self.places[name].of(slot) for name in TABLES)
        self.spans[slot] = torch.tensor([a.start, b.start, len(b), gain.start if gain else -1])
        self.biased[slot] = bias.start if bias else -1

    def _release(self, slot: int) -> None:
        for places in self.places.values():
            places.free(slot)

    def _hold(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor, persistent=False)

    def _row_bytes(self, name: str) -> int:
        table: Tensor = getattr(self, name)
        return table.shape[1] * table.element_size()
