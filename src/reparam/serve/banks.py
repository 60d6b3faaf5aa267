"""The banks of a served model: which slot every token of a step uses, and the slots' contents.

While a step runs, only slots that no request uses are written, and tables are only replaced between two steps.

Shapes: N tokens of the step, R requests in it, I and O widths of a site.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from reparam.core.base import Factors
from reparam.kernels import rows
from reparam.sites import targets
from reparam.sites.bank import Bank
from reparam.sites.expert_paths import open_at
from reparam.sites.experts import Opened, settle
from reparam.sites.held import BANK
from reparam.sites.module import Adapted
from reparam.sites.routing import Routing
from reparam.sites.walk import put
from reparam.sites.wrapped import at

Contents = Mapping[str, tuple[Factors | None, Tensor | None]]
"""What an adapter changes, by the path of the site: the factors of its weight, and the change [O] of its bias."""


class Banks:
    """The banks of a model, and the slots of the next step."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sites: dict[str, Adapted] = {}
        self._device: torch.device = next(model.parameters()).device
        if self._device.type == "cpu":
            rows.backend()  # loads the kernel, so that the first request need not wait for it
        self._tokens, self._heads = (Routing(self._slots(())) for _ in range(2))
        self._on = False
        self._count = 64  # slots that every bank knows
        self._waiting: dict[str, Adapted] = {}
        """Sites that are not in the model yet."""
        self._own: list[str] = []
        """The sites that were plain modules."""
        self._experts: dict[str, Opened] = {}
        """The modules of experts that have banks, by path."""
        held: Any = model
        self._head = held.get_output_embeddings()

    def route(self, slots: Sequence[int], lengths: Sequence[int], heads: Sequence[int] | None) -> None:
        """Use these slots [R], of requests that have `lengths` tokens each, in the next step; -1 is the base.

        `heads` are the slots of the vectors that the output head gets, if those are not all tokens of the step. If all
        slots are -1, the plain model computes the step.
        """
        on = any(slot >= 0 for slot in slots)
        if on:
            self._set(self._tokens, tuple(slots), tuple(lengths))
            if heads is None:
                self._set(self._heads, tuple(slots), tuple(lengths))
            else:
                self._set(self._heads, tuple(heads), (1,) * len(heads))
        if on != self._on:
            self._on = on
            for site in self.sites.values():
                self._activate(site)
            for holder in self._experts.values():
                holder.routing = self._tokens if on else None

    def nbytes(self) -> int:
        """The bytes of all tables, with their free rows."""
        return sum(bank.nbytes for bank in self._banks().values())

    def bytes_of(self, slot: int) -> int:
        """The bytes that a slot takes."""
        return sum(bank.bytes_of(slot) for bank in self._banks().values())

    def bytes_for(self, contents: Contents) -> int:
        """The bytes that a slot with these contents would take."""
        return sum(self._bank(path).bytes_for(*own) for path, own in contents.items())

    def write(
        self, slot: int, contents: Contents, quiet: Callable[[], AbstractContextManager[None]], *, more: int = 0
    ) -> None:
        """Fill a slot that no request uses. Tables that must grow get room for so many `more` adapters.

        Free rows of the tables are written at once. Tables without room are copied into larger ones first, which
        replace them inside `quiet()`, a context in which no step runs.
        """
        if slot >= self._count:
            with quiet():
                self._count = 2 * slot
                for bank in self._banks().values():
                    bank.free(self._count - 1)
        new: dict[str, Bank] = {}
        for path, own in contents.items():
            bank = self._bank(path)
            if path in self.sites and bank.has_room(slot, *own):
                bank.write(slot, *own)
            else:
                new[path] = bank.twin()
                new[path].write(slot, *own, more=more)
        if new:
            with quiet():
                self._place(new)

    def free(self, slot: int) -> None:
        """Empty a slot that no request uses. Its rows can be used again."""
        for bank in self._banks().values():
            bank.free(slot)

    def leave(self) -> None:
        """Put the model's own modules back."""
        for site in self.sites.values():
            site.active = None
            del site.updates[BANK]
        put(self.model, {path: self.sites[path].restore() for path in self._own})
        for holder in self._experts.values():
            holder.routing = None
            settle(holder)
        self.sites.clear()
        self._own.clear()
        self._experts.clear()

    def _place(self, banks: Mapping[str, Bank]) -> None:
        """Use these banks, at sites that are put into the model if they are not in it."""
        put(self.model, {path: self._waiting[path] for path in banks if path in self._waiting})
        for path, bank in banks.items():
            if path in self._waiting:
                self._own.append(path)
            site = self.sites.setdefault(path, self._waiting.pop(path, at(self.model, path)))  # type: ignore[arg-type]
            site.updates[BANK] = bank
            self._activate(site)
            if not site.has_bank:
                holder = at(self.model, path.rsplit(".", 2)[0])
                assert isinstance(holder, Opened)
                holder.routing = self._tokens if self._on else None
                self._experts[path.rsplit(".", 2)[0]] = holder

    def _activate(self, site: Adapted) -> None:
        """Let the site compute with its bank, or as the base does; a module of experts reads its banks itself."""
        site.active = BANK if self._on and site.has_bank else None

    def _bank(self, path: str) -> Bank:
        """The bank at a path; a new one, if there is none."""
        if path in self.sites:
            return self.sites[path].updates[BANK]  # type: ignore[return-value]
        open_at(self.model, path)
        module = at(self.model, path)
        if not isinstance(module, Adapted):
            self._waiting[path] = self._waiting.get(path) or targets.wrap(module)
        site = module if isinstance(module, Adapted) else self._waiting[path]
        bank = Bank(site.frozen, self._heads if module is self._head else self._tokens)
        bank.free(self._count - 1)
        return bank.eval()

    def _banks(self) -> dict[str, Bank]:
        return {path: site.updates[BANK] for path, site in self.sites.items()}  # type: ignore[misc]

    def _set(self, routing: Routing, slots: tuple[int, ...], lengths: tuple[int, ...]) -> None:
        if slots != routing.slot_list:  # the banks compute what they need from the slots once for each tuple
            routing.route(self._slots(slots))
        if lengths != routing.packed:
            routing.packed = lengths

    def _slots(self, slots: tuple[int, ...]) -> Tensor:
        return torch.tensor(slots, dtype=torch.int64, device=self._device)
