"""The module in the place of one that adapters train in full, such as a task head."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reparam.sites.layout import Layout
from reparam.sites.routing import Routing


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

    def forward(self, x: Tensor) -> Tensor:
        """The output of the active copy; in a mixed batch, each copy computes its own rows of x."""
        if self.routing is None:
            return self.copy_of(self.active)(x)
        if self.routing.trial is not None:
            self.routing.trial.see(self, x)
            return self.origin(x)
        layout = self.routing.layout(self, x.shape if x.is_floating_point() else torch.Size((*x.shape, 1)))
        parts: dict[str | None, list[int]] = {}
        for row, name in enumerate(self.routing.names[: layout.rows]):
            parts.setdefault(name if name is not None and name in self.updates else None, []).append(row)
        if len(parts) == 1:
            return self.copy_of(next(iter(parts)))(x)
        by_row = layout.by_row(x)
        outputs = [self.copy_of(name)(layout.joined(by_row[rows])) for name, rows in parts.items()]
        return _joined(outputs, list(parts.values()), layout)

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


def _joined(outputs: Sequence[Any], rows: Sequence[list[int]], layout: Layout) -> Any:
    """One output for all rows, given one for each group of rows; each is a tensor, or a tuple of tensors."""
    if isinstance(outputs[0], tuple):
        return tuple(_joined(parts, rows, layout) for parts in zip(*outputs, strict=True))
    by_row = [dataclasses.replace(layout, rows=len(own)).by_row(y) for own, y in zip(rows, outputs, strict=True)]
    order = torch.tensor([row for own in rows for row in own], device=outputs[0].device)
    return layout.joined(torch.cat(by_row)[order.argsort()])
