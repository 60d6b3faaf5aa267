"""The slots of adapters in the banks of a model: which adapter has which one, and which are given up for a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reparam.core.base import Factors
from reparam.sites.bank import Bank
from reparam.sites.held import BANK
from reparam.sites.module import Adapted
from reparam.sites.routing import Routing

if TYPE_CHECKING:
    from reparam.adapter.adapter import Adapter


class Slots:
    """Slot numbers by adapter name, the least recently used first. An adapter has the same slot in all banks."""

    def __init__(self, sites: Mapping[str, Adapted], routing: Routing) -> None:
        self._sites = sites
        self._routing = routing
        self._by_name: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def of(self, name: str | None) -> int:
        """The slot of an adapter, or -1 for the base model."""
        return -1 if name is None else self._by_name[name]

    def banks(self) -> dict[str, Bank]:
        """The banks by the path of their site."""
        return {path: site.updates[BANK] for path, site in self._sites.items() if BANK in site.updates}  # type: ignore[misc]

    def fill(self, used: Sequence[Adapter], stale: Sequence[Adapter], budget: int | None) -> None:
        """Write the `stale` ones of the adapters that are `used`.

        With a budget in bytes, other adapters lose their slots, least recently used first, until the used ones fit.
        Raises ValueError, before anything changes, if they alone need more.
        """
        if budget is not None:
            self._make_room(used, stale, budget)
        for adapter in stale:
            self.write(adapter, exact=budget is not None)
        for adapter in used:
            self._by_name[adapter.name] = self._by_name.pop(adapter.name)
        if budget is not None and sum(bank.nbytes for bank in self.banks().values()) > budget:
            for bank in self.banks().values():
                bank.trim()

    def write(self, adapter: Adapter, *, exact: bool = False) -> None:
        """Write the adapter's factors and changes of biases into its slot at every site."""
        taken = set(self._by_name.values())
        slot = self._by_name.setdefault(adapter.name, next(i for i in range(len(taken) + 1) if i not in taken))
        for path in self._sites:
            self._bank(path).write(slot, *contents_of(self._sites[path], adapter.name), exact)

    def remove(self, name: str) -> None:
        """Free the slot of an adapter that is removed, if it has one, and the memory of tables that are half empty."""
        if name in self._by_name:
            self._free(name)
            for bank in self.banks().values():
                bank.trim(0.5)

    def _free(self, name: str) -> None:
        slot = self._by_name.pop(name)
        for bank in self.banks().values():
            bank.free(slot)

    def _bank(self, path: str) -> Bank:
        """The bank of a site; a new one has an empty slot for each adapter."""
        site = self._sites[path]
        if BANK not in site.updates:
            site.updates[BANK] = Bank(site.frozen, self._routing).train(site.training)
            site.updates[BANK].free(max(self._by_name.values(), default=0))  # type: ignore[operator]
        return site.updates[BANK]  # type: ignore[return-value]

    @torch.no_grad()
    def _make_room(self, used: Sequence[Adapter], stale: Sequence[Adapter], budget: int) -> None:
        needs = {
            adapter.name: self._bytes_for(adapter) if adapter in stale else self._bytes_of(adapter.name)
            for adapter in used
        }
        need = sum(needs.values())
        if need > budget:
            largest = max(needs, key=lambda name: needs[name])
            raise ValueError(
                f"select: the {len(needs)} adapters of this batch need {need:,} bytes in the banks, above the budget "
                f"of {budget:,}; the largest is {largest!r} with {needs[largest]:,}; raise the budget, or select fewer "
                f"adapters at a time"
            )
        others = {name: self._bytes_of(name) for name in self._by_name if name not in needs}
        for name in list(others):
            if need + sum(others.values()) > budget:
                self._free(name)
                del others[name]

    def _bytes_for(self, adapter: Adapter) -> int:
        return sum(self._bank(path).bytes_for(*contents_of(self._sites[path], adapter.name)) for path in self._sites)

    def _bytes_of(self, name: str) -> int:
        return sum(bank.bytes_of(self._by_name[name]) for bank in self.banks().values())


def contents_of(site: Adapted, name: str) -> tuple[Factors | None, Tensor | None]:
    """What a bank at a site holds for this adapter: its factors, and its change of the bias [O].

    Raises InputDependentError if the adapter's update has no factors.
    """
    update: Any = site.updates[name] if name in site.updates else None  # noqa: SIM401  (a ModuleDict has no `get`)
    own = site.biases[name] - site.bias if name in site.biases else None
    offset = None if update is None else update.bias_delta()
    change = own if offset is None else offset if own is None else own + offset
    return None if update is None else update.factors(site.frozen), change
