"""What the factors in the slots of a mixed batch were computed from, to see whether it has changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from reparam.core.versions import Stamp, content, sample, stamp_of, tensors_of
from reparam.sites.module import Adapted

if TYPE_CHECKING:
    from reparam.adapter.adapter import Adapter

Sums = tuple[int, ...] | None
Frozen = tuple[Stamp | None, Sums, Sums]
Written = tuple[Sums, tuple[Frozen, ...]]
"""Checksums of an adapter's tensors, and what is compared of the frozen tensors at each of its sites."""


def tensors_in_slot(adapter: Adapter) -> list[Tensor]:
    """The tensors that the adapter's factors are computed from, without those of the base."""
    found = [] if adapter.shared is None else tensors_of(adapter.shared)
    for module in (m for m in adapter.modules.values() if m.has_bank):
        found += tensors_of(module.updates[adapter.name])
        if adapter.name in module.biased:
            found.append(module.biases[adapter.name])
    return found


def frozen_at(module: Adapted) -> Frozen:
    """The stamp and the sample of the frozen matrix, and a checksum of the bias."""
    held = module.frozen.held()
    return stamp_of(held), sample(held), content([] if module.bias is None else [module.bias])
