"""Select the active adapter of a model: one, none, or one per row of the batch. Selecting costs O(sites)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from reparam.adapter import resizing
from reparam.adapter.mixed import Mixed
from reparam.adapter.slots import Slots
from reparam.adapter.spans import Spans, check
from reparam.adapter.written import Written, frozen_at, tensors_in_slot
from reparam.core import continuing
from reparam.core.checks import nearest
from reparam.core.text import counted
from reparam.core.versions import content
from reparam.io import whole
from reparam.io.record import Record, Tied
from reparam.sites.expert_paths import experts_with
from reparam.sites.experts import Opened
from reparam.sites.held import BANK
from reparam.sites.module import SHARED, Adapted
from reparam.sites.replaced import Replaced
from reparam.sites.routing import Routing
from reparam.sites.wrapped import bare

if TYPE_CHECKING:
    from reparam.adapter.adapter import Adapter

Choice = str | Sequence[str | None] | None
Request = tuple[Choice, Spans | None, int | None]
"""A choice, the spans of a packed batch, and the most bytes that the banks may hold for it."""


class Selection:
    """The result of `select`: use it in a `with` statement to restore the previous choice afterwards."""

    def __init__(self, state: AdapterState, before: Request) -> None:
        self._state = state
        self._before = before

    def __enter__(self) -> Selection:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._state.select_again(self._before)

    def __repr__(self) -> str:
        now, model = _named(self._state.choice), type(self._state.model).__name__
        return f"Selection({now} on {model}, before: {_named(self._before[0])})"


class AdapterState:
    """The adapters of one model and the current choice, stored on the model as `reparam_state`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.adapters: dict[str, Adapter] = {}
        self._request: Request = None, None, None
        self.sites: dict[str, Adapted] = {}
        self.replaced: dict[str, Replaced] = {}
        self._experts: dict[str, Opened] = {}
        """The modules of experts that have sites, by path."""
        self._banked: dict[str, Adapted] = {}
        """The sites that have a bank in a mixed batch."""
        self._routing = Routing(torch.zeros(0, dtype=torch.int64))
        self._mixed = Mixed(model, self._routing, self._renew_before_forward)
        self._slots = Slots(self._banked, self._routing)
        self._written: dict[str, Written] = {}
        """What the factors in the adapters' slots were computed from."""
        self._hooks: list[Any] = []
        self.unnested: list[nn.TransformerEncoder] = []
        """Encoders in which nested tensors are turned off while adapters are on the model."""
        self._entry_hooks: tuple[Any, ...] = ()

    @property
    def choice(self) -> Choice:
        """What is selected."""
        return self._request[0]

    def join(self) -> None:
        """Put this state on the model, which then describes its adapters in its state dict."""
        self.model.reparam_state = self  # type: ignore[assignment]
        resizing.guard(self.model)
        self._entry_hooks = (
            self.model.register_state_dict_post_hook(_add_entry),
            self.model.register_load_state_dict_pre_hook(_drop_entry),
        )

    def leave(self) -> None:
        """Take this state off the model."""
        for hook in self._entry_hooks:
            hook.remove()
        resizing.release(self.model)
        del self.model.reparam_state

    def adopt(self, adapter: Adapter) -> None:
        """Register a new adapter, its sites and its replaced modules."""
        self.adapters[adapter.name] = adapter
        self.sites.update(adapter.modules)
        self._banked.update(
            {path: m for path, m in adapter.modules.items() if m.has_bank}
        )  # in place: the slots share it
        self._experts |= {
            path.rsplit(".", 2)[0]: holder
            for path, module in adapter.modules.items()
            if not module.has_bank and (holder := experts_with(self.model, path)) is not None
        }
        self.replaced |= adapter.replaced

    def forget(self, name: str) -> None:
        """Drop an adapter, also from the banks. Selects the base if the adapter was part of the current choice."""
        chosen = [self.choice] if isinstance(self.choice, str) else self.choice or []
        if name in chosen:
            self.select(None)
        adapter = self.adapters.pop(name)
        for module in adapter.modules.values():
            module.drop(name)
        for holder in adapter.replaced.values():
            holder.drop(name)
        if adapter.shared is not None:
            del getattr(self.model, SHARED)[name]
        self._slots.remove(name)
        self._written.pop(name, None)

    def check(self, name: object) -> None:
        """Raise ValueError if no adapter has this name."""
        if name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise ValueError(f"no adapter is named {name!r}{nearest(str(name), self.adapters)}; the model has: {known}")

    def select(self, which: Choice, *, spans: Spans | None = None, budget: int | None = None) -> Selection:
        """Make one adapter, none, or one per row the current choice, as `reparam.select` describes."""
        rows = None if which is None or isinstance(which, str) else list(which)
        for name in {which} if rows is None else set(rows):
            if name is not None:
                self.check(name)
        if rows is not None and not rows:
            raise ValueError("select: the list is empty; pass one name, or None, for each row of the batch")
        if spans is not None:
            check(spans, len(rows or ()))
        if rows is not None:
            self._renew(rows, budget)
        selection = Selection(self, self._request)
        self._mixed.stop()
        if rows is not None:
            self._route(rows, spans)
        for hook in self._hooks:
            hook.remove()
        self._hooks = self._hook(self.adapters[which]) if isinstance(which, str) else []
        self._request = which if rows is None else rows, spans, budget
        single = which if isinstance(which, str) else None if rows is None else BANK
        for module in self.sites.values():
            module.active = single if single is not None and single in module.updates else None
        for holder in self.replaced.values():
            holder.active, holder.routing = single, None if rows is None else self._routing
        for experts in self._experts.values():
            experts.routing = None if rows is None else self._routing
        return selection

    def _hook(self, adapter: Adapter) -> list[Any]:
        """Put the hooks on the model that this adapter needs."""
        before = getattr(adapter.shared, "before_forward", None)
        hooks = [] if before is None else [self.model.register_forward_pre_hook(before, with_kwargs=True)]
        if any(update.caches for update in adapter.updates.values()):
            hooks.append(self.model.register_forward_pre_hook(continuing.begin, with_kwargs=True))
            hooks.append(self.model.register_forward_hook(continuing.end, always_call=True))
        return hooks

    def select_again(self, before: Request) -> None:
        """Restore an earlier choice, or the base if one of its adapters was removed.

        Does nothing if the model has no adapters left.
        """
        which, spans, budget = before
        if getattr(self.model, "reparam_state", None) is self:
            names = {which} if which is None or isinstance(which, str) else set(which)
            if names <= {None, *self.adapters}:
                self.select(which, spans=spans, budget=budget)
            else:
                self.select(None)

    def refresh(self) -> None:
        """Rewrite the banks because the inputs of the factors changed, such as the frozen weights."""
        self.forget_factors()
        if self.choice is not None and not isinstance(self.choice, str):
            self.select_again(self._request)

    def forget_factors(self) -> None:
        """Mark all bank slots as stale, so that the next selection by a list rewrites them."""
        self._written.clear()

    def _route(self, rows: list[str | None], spans: Spans | None) -> None:
        """Assign each row [B] its slot (-1 for the base)."""
        holder = next(iter(self.sites.values()), None)
        device = next(self.model.parameters()).device if holder is None else holder.frozen.device
        slots = torch.tensor([self._slots.of(name) for name in rows], device=device)
        self._mixed.start(slots, rows, {**self._slots.banks(), **self.replaced, **self._experts}, spans)

    def _renew_before_forward(self, rows: Sequence[str | None]) -> None:
        self._renew(rows, self._request[2])

    def _renew(self, rows: Sequence[str | None], budget: int | None) -> None:
        """Write the slots of these adapters that are not written, or whose factors may have changed."""
        used = [self.adapters[name] for name in dict.fromkeys(rows) if name is not None]
        for adapter in used:
            adapter.check_values("its factors cannot be put into a mixed batch")
        paths = {adapter.name: [path for path, m in adapter.modules.items() if m.has_bank] for adapter in used}
        frozen = {
            path: frozen_at(self.sites[path]) for path in dict.fromkeys(path for own in paths.values() for path in own)
        }
        written = {
            adapter.name: (content(tensors_in_slot(adapter)), tuple(frozen[path] for path in paths[adapter.name]))
            for adapter in used
        }
        stale = [
            adapter
            for adapter in used
            if adapter.name not in self._slots
            or written[adapter.name][0] is None
            or self._written.get(adapter.name) != written[adapter.name]
        ]
        for adapter in stale:
            for module in (m for m in adapter.modules.values() if not m.has_bank):
                module.updates[adapter.name].factors(module.frozen)  # type: ignore[operator]  # raises if it has none
        self._slots.fill(used, stale, budget)
        self._written |= written


def _named(choice: Choice) -> str:
    """Format a choice: a name, "the base", or the number of rows of each adapter.

    >>> _named("task"), _named(None), _named(["a", "b", None, "a"])
    ("'task'", 'the base', "4 rows: 2 of 'a', 1 of 'b', 1 of the base")
    """
    if choice is None:
        return "the base"
    if isinstance(choice, str):
        return repr(choice)
    counts = ", ".join(f"{count} of {_named(name)}" for name, count in Counter(choice).items())
    return f"{counted(len(choice), 'row')}: {counts}"


def _add_entry(model: nn.Module, tensors: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Describe the adapters beside their tensors, so that `load` finds them in the files of the model."""
    records = {
        name: Record(
            adapter.method.with_ranks_of(adapter.updates),
            adapter.sites,
            {},
            tuple(adapter.replaced),
            tied={path: Tied(site, adapter.modules[path].kind) for path, site in adapter.tied.items()},
        )
        for name, adapter in state_of(model).adapters.items()
    }
    tensors[prefix + whole.ENTRY] = whole.entry(records)
    # Copies of modules that share a weight share it, too; transformers saves only the base's own shared tensors.
    seen: set[Any] = set()
    for name, adapter in state_of(model).adapters.items():
        for path, holder in adapter.replaced.items():
            key, weight = f"{prefix}{path}.{whole.UPDATES}.{name}.weight", getattr(holder.updates[name], "weight", None)
            if weight in seen and key in tensors:
                tensors[key] = tensors[key].detach().clone()
            seen.add(weight)


def _drop_entry(model: nn.Module, tensors: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Leave the description of the adapters out of what is loaded: the model has them."""
    tensors.pop(prefix + whole.ENTRY, None)


def state_of(model: nn.Module) -> AdapterState:
    """The adapter state of the model. Raises ValueError if the model has no adapter."""
    state = getattr(bare(model), "reparam_state", None)
    if state is None:
        raise ValueError(f"this {type(model).__name__} has no adapter on it; attach or load one first")
    return state


def select(
    model: nn.Module,
    which: str | Sequence[str | None] | None,
    *,
    spans: Spans | None = None,
    budget: int | None = None,
) -> Selection:
    """Make the adapter with this name the active one; None selects the base model.

    A list gives one name (or None) per row of the following batches, for inference with mixed batches. With `spans`,
    the batch is packed: one row [1, N] that holds a sequence for each name, end to end. `spans` are their numbers of
    tokens, or the argument of the model's forward that tells them in each batch: "position_ids", which start again at
    each sequence, or "cu_seq_lens_q".

    The factors of the adapters are copied into banks, and stay there for later batches. `budget` is the most bytes that
    all banks of the model may hold: other adapters leave the banks, least recently used first, and come back when they
    are selected again. By default, adapters stay in the banks until they are removed.

    Raises ValueError, without a change, for an unknown name, an empty list, and adapters that need more than the
    budget; and at the start of the model's forward pass if the batch has a different number of rows or tokens, or if
    rows or sequences depend on each other.

    Use the returned `Selection` in a `with` statement to restore the previous choice at its end, even after an
    exception.
    """
    return state_of(model).select(which, spans=spans, budget=budget)
