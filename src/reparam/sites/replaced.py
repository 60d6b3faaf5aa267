"""The module in the place of one that adapters train in full, such as a task head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reparam.sites.layout import for_each_row, groups
from reparam.sites.routing import Routing

NOTHING = torch.zeros(1, 1)
"""Stands for the input of a module that gets no tensor, such as positions that are computed from sizes."""


class Replaced(nn.Module):
    """A module that adapters train in full (for example a task head): the original and one copy per adapter."""

    def __init__(self, origin: nn.Module) -> None:
        super().__init__()
        self.origin = origin
        self.updates = nn.ModuleDict()
        self.active: str | None = None
        self.routing: Routing | None = None  # in a mixed batch: the adapter of each row

    def copy_of(self, name: str | None) -> nn.Module:
        """The module that this adapter uses: its own copy, or the original if it has none."""
        return self.updates[name] if name is not None and name in self.updates else self.origin

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the active copy; in a mixed batch, each copy computes its own rows of its argument.

        If rows share their input, or there are several arguments, such as those of OPT's positions, each copy computes
        all rows. The output is then [B, T, ...] in any case, so that what the model does with it is the same for all
        batches.
        """
        routing = self.routing
        if routing is None:
            return self.copy_of(self.active)(*args, **kwargs)
        x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), NOTHING)
        if routing.trial is not None:
            routing.trial.see(self, x)
            if len(args) + len(kwargs) > 1 or x is NOTHING:
                routing.trial.whole.add(self)
            return routing.trial.output(self, self.origin(*args, **kwargs))
        layout = routing.layout(self, x.shape if x.is_floating_point() else torch.Size((*x.shape, 1)))
        own = set(self.updates)
        parts = groups([name if name in own else None for name in routing.names[: layout.rows]])
        if layout.shared:
            found = {name: for_each_row(self.copy_of(name)(*args, **kwargs), layout.rows) for name in parts}
            return layout.merge([y[parts[name]] for name, y in found.items()], list(parts.values()))
        if len(parts) == 1:
            return self.copy_of(next(iter(parts)))(*args, **kwargs)
        if len(args) + len(kwargs) > 1:
            routing.refuse(x.shape, "a module that adapters train whole got several arguments")
        outputs = [self.copy_of(name)(layout.pick(x, rows)) for name, rows in parts.items()]
        return layout.merge(outputs, list(parts.values()))

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The original module's tensors under the names that they have without adapters, and the copies' tensors."""
        found = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        for name in self.origin.state_dict():
            found[prefix + name] = found.pop(f"{prefix}origin.{name}")
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in [k for k in state_dict if not k.startswith((f"{prefix}updates.", f"{prefix}origin."))]:
            state_dict[f"{prefix}origin.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def weight(self) -> Tensor:
        """The weight of the active copy. Models read its dtype."""
        return self.copy_of(self.active).weight  # type: ignore[return-value]

    def drop(self, name: str) -> None:
        """Remove the adapter's copy, if it has one."""
        if name in self.updates:
            del self.updates[name]
