"""Which adapter a model uses: one, none, or another one for each row of the batch. Each choice costs O(sites)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reparam.core.base import Update
from reparam.core.checks import nearest
from reparam.core.versions import Steps
from reparam.io import whole
from reparam.io.record import Record
from reparam.sites.bank import Bank, Routing
from reparam.sites.module import SHARED, Adapted, Replaced

if TYPE_CHECKING:
    from reparam.adapter.adapter import Adapter

Choice = str | Sequence[str | None] | None
BANK = "*"  # the key that a site's bank has among its updates; no adapter can have this name


class Selection:
    """What `select` returns: use it in a `with` to have the previous choice back afterwards."""

    def __init__(self, state: AdapterState, before: Choice) -> None:
        self._state = state
        self._before = before

    def __enter__(self) -> Selection:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._state.select_again(self._before)

    def __repr__(self) -> str:
        now, model = _named(self._state.choice), type(self._state.model).__name__
        return f"Selection({now} on {model}, before: {_named(self._before)})"


class AdapterState:
    """The adapters of one model and the current choice; it hangs on the model as `reparam_state`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.adapters: dict[str, Adapter] = {}
        self.choice: Choice = None
        self.sites: dict[str, Adapted] = {}
        self.replaced: dict[str, Replaced] = {}
        self._routing = Routing(torch.zeros(0, dtype=torch.int64))
        self._slots: dict[str, int] = {}
        self._versions: dict[str, tuple[int, int]] = {}
        self._hook: Any = None
        self._entry_hooks: tuple[Any, ...] = ()

    def join(self) -> None:
        """Put this state on the model, which then describes its adapters in its state dict."""
        self.model.reparam_state = self  # type: ignore[assignment]
        self._entry_hooks = (
            self.model.register_state_dict_post_hook(_add_entry),
            self.model.register_load_state_dict_pre_hook(_drop_entry),
        )

    def leave(self) -> None:
        """Take this state off the model."""
        for hook in self._entry_hooks:
            hook.remove()
        del self.model.reparam_state

    def adopt(self, adapter: Adapter) -> None:
        """Know about a new adapter."""
        self.adapters[adapter.name] = adapter
        self.sites |= adapter.modules
        self.replaced |= adapter.replaced

    def forget(self, name: str) -> None:
        """Drop an adapter, from the bank too; the base is selected if the choice named it."""
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
        self._slots.pop(name, None)
        self._versions.pop(name, None)

    def check(self, name: object) -> None:
        """Raise ValueError unless an adapter has this name."""
        if name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise ValueError(f"no adapter is called {name!r}{nearest(str(name), self.adapters)}; there are: {known}")

    def select(self, which: Choice) -> Selection:
        """See `reparam.select`."""
        rows = None if which is None or isinstance(which, str) else list(which)
        for name in {which} if rows is None else set(rows):
            if name is not None:
                self.check(name)
        if rows is not None and not rows:
            raise ValueError("select: an empty list; give one name, or None, for each row of the batch")
        selection = Selection(self, self.choice)
        if rows is not None:
            self._route(rows)
        if self._hook is not None:
            self._hook.remove()
        shared = self.adapters[which].shared if isinstance(which, str) else None
        before = getattr(shared, "before_forward", None) if rows is None else self._check_rows
        self._hook = None if before is None else self.model.register_forward_pre_hook(before, with_kwargs=True)
        self.choice = which if rows is None else rows
        single = which if isinstance(which, str) else None if rows is None else BANK
        for module in self.sites.values():
            module.active = single if single is not None and single in module.updates else None
        for holder in self.replaced.values():
            holder.active, holder.rows = single, rows
        return selection

    def select_again(self, before: Choice) -> None:
        """Back to an earlier choice; to the base where an adapter in it is gone, to nothing where all are."""
        if getattr(self.model, "reparam_state", None) is self:
            names = {before} if before is None or isinstance(before, str) else set(before)
            self.select(before if names <= {None, *self.adapters} else None)

    def refresh(self) -> None:
        """What factors depend on has changed, the frozen weights for instance: the bank is written anew when used."""
        self.forget_factors()
        if self.choice is not None and not isinstance(self.choice, str):
            self.select(self.choice)

    def forget_factors(self) -> None:
        """Write the bank anew when adapters are next selected in a list."""
        self._versions.clear()

    def _route(self, rows: list[str | None]) -> None:
        """Bring the bank up to date for these adapters, and its slots to these rows."""
        names = [name for name in dict.fromkeys(rows) if name is not None]
        used = [self.adapters[name] for name in names]
        for adapter in used:
            version = Steps.count, sum(p._version for p in adapter.parameters())
            if self._versions.get(adapter.name) != version:
                self._write(adapter)
                self._versions[adapter.name] = version
        device = next(self.model.parameters()).device
        self._routing.slots = torch.tensor([-1 if n is None else self._slots[n] for n in rows], device=device)
        self._routing.tokens = None

    def _write(self, adapter: Adapter) -> None:
        """Write one adapter's factors into its slot at every site."""
        taken = set(self._slots.values())
        slot = self._slots.setdefault(adapter.name, next(i for i in range(len(taken) + 1) if i not in taken))
        for path, module in self.sites.items():
            if BANK not in module.updates:
                module.updates[BANK] = Bank(module.frozen, self._routing).train(module.training)
            bank: Bank = module.updates[BANK]  # type: ignore[assignment]
            update: Update | None = adapter.modules.get(path) and module.updates[adapter.name]  # type: ignore[assignment]
            own = module.biases[adapter.name] - module.bias if adapter.name in module.biases else None
            offset = None if update is None else update.bias_delta()
            added = own if offset is None else offset if own is None else own + offset
            bank.write(slot, None if update is None else update.factors(module.frozen), added)

    def _check_rows(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward: the batch must have as many rows as names were given."""
        named = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args, *kwargs.values())
        batch = next((x for x in named if isinstance(x, Tensor)), None)
        rows = len(self._routing.slots)
        if batch is None or batch.shape[0] != rows:
            shape = None if batch is None else list(batch.shape)
            raise ValueError(
                f"{rows} adapter names were selected, one per row, but the batch has shape {shape}; select as many as "
                f"there are rows (with beams or several returned sequences, repeat each name that often)"
            )
        self._routing.tokens = batch.shape[1] if batch.ndim > 1 else 1


def _named(choice: Choice) -> str:
    """A choice for reading: a name, "the base", or how many rows each adapter has.

    >>> _named("task"), _named(None), _named(["a", "b", None, "a"])
    ("'task'", 'the base', "4 rows: 2 of 'a', 1 of 'b', 1 of the base")
    """
    if choice is None:
        return "the base"
    if isinstance(choice, str):
        return repr(choice)
    counts = ", ".join(f"{count} of {_named(name)}" for name, count in Counter(choice).items())
    return f"{len(choice)} rows: {counts}"


def _add_entry(model: nn.Module, tensors: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Describe the adapters beside their tensors, so that `load` finds them in the files of the model."""
    records = {
        name: Record(adapter.method.with_ranks_of(adapter.updates), adapter.sites, {}, tuple(adapter.replaced))
        for name, adapter in state_of(model).adapters.items()
    }
    tensors[prefix + whole.ENTRY] = whole.entry(records)


def _drop_entry(model: nn.Module, tensors: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Leave the description of the adapters out of what is loaded: the model has them."""
    tensors.pop(prefix + whole.ENTRY, None)


def state_of(model: nn.Module) -> AdapterState:
    """The state on the model. Raises ValueError where no adapter is."""
    state = getattr(model, "reparam_state", None)
    if state is None:
        raise ValueError(f"this {type(model).__name__} has no adapter on it; attach or load one first")
    return state
