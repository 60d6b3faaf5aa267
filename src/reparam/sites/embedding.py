"""The site of an embedding: E' [V, I] = diag(gain) E + B A, computed only for the rows that are looked up."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from reparam.core.base import Site, Update
from reparam.sites.kinds import kind
from reparam.sites.module import Adapted


@kind("embedding")
class Embedding(Adapted):
    """ids [...] -> E'[ids] [..., I]."""

    plural = "embeddings"

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        """Whether the module is an `nn.Embedding`."""
        return isinstance(module, nn.Embedding)

    @classmethod
    def unsupported_reason(cls, module: nn.Module) -> str | None:
        """The reason if it is another module, or its forward does more than a lookup; otherwise None."""
        name = type(module).__name__
        if not isinstance(module, nn.Embedding):
            return f"{name} is not an embedding"
        if "forward" in vars(module):
            return f"{name} has a patched forward (set by a device map or a hook); load the model without it"
        if type(module).forward is not nn.Embedding.forward:
            return f"{name} overrides nn.Embedding.forward, which an update would bypass"
        if module.max_norm is not None:
            return f"{name} has max_norm, which rewrites the frozen rows during a forward"
        return None

    @classmethod
    def describe(cls, name: str, module: nn.Module) -> Site:
        """One row per id: O = V, I = width."""
        return Site(name, cls.kind, *module.weight.shape)  # type: ignore[misc]

    @classmethod
    def adopt(cls, module: nn.Module) -> Self:
        """Take over an `nn.Embedding`, sharing its parameter."""
        return cls(module)

    def check_update(self, update: Update) -> None:
        """Raise InputDependentError if the update cannot compute rows of W'."""
        update.rows(torch.zeros(1, dtype=torch.int64, device=self.frozen.device), self.frozen)

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of the base matrix or, if an adapter is active, of its W'."""
        name = self.active
        if name is None:
            return self.frozen.rows(ids)
        found: Tensor = self.updates[name].rows(ids, self.frozen)  # type: ignore[operator]
        padding: int | None = self.origin[0].padding_idx  # type: ignore[assignment]
        if padding is None or not found.requires_grad:
            return found
        return torch.where((ids == padding).unsqueeze(-1), found.detach(), found)  # as nn.Embedding: no gradient there
