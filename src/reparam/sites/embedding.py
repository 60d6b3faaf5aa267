"""An embedding as a site: E' [V, I] = diag(gain) E + B A, looked up row by row."""

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
        """An `nn.Embedding`."""
        return isinstance(module, nn.Embedding)

    @classmethod
    def unsupported_reason(cls, module: nn.Module) -> str | None:
        """It is another module, or one where a lookup is not the whole map."""
        name = type(module).__name__
        if not isinstance(module, nn.Embedding):
            return f"{name} is not an embedding"
        if "forward" in vars(module):
            return f"{name} has a forward of its own set on it (by a device map or a hook); load the model without that"
        if type(module).forward is not nn.Embedding.forward:
            return f"{name} overrides nn.Embedding.forward, which an update would bypass"
        if module.max_norm is not None:
            return f"{name} has max_norm, which rewrites the frozen rows during a forward"
        return None

    @classmethod
    def describe(cls, name: str, module: nn.Module) -> Site:
        """A row for each id: O = V, I = width."""
        return Site(name, cls.kind, *module.weight.shape)  # type: ignore[misc]

    @classmethod
    def adopt(cls, module: nn.Module) -> Self:
        """Take over an `nn.Embedding`, sharing its parameter."""
        return cls(module)

    def check_update(self, update: Update) -> None:
        """The update must have rows."""
        update.rows(torch.zeros(1, dtype=torch.int64, device=self.frozen.device), self.frozen)

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of the base, or of the active update's matrix."""
        name = self.active
        if name is None:
            return self.frozen.rows(ids)
        return self.updates[name].rows(ids, self.frozen)  # type: ignore[operator]
