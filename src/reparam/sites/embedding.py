"""An embedding as a site: E' [V, I] = diag(gain) E + B A, looked up row by row."""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn

from reparam.core.base import Kind
from reparam.sites.module import Adapted
from reparam.weights.dense import DenseWeight


class Embedding(Adapted):
    """ids [...] -> E'[ids] [..., I]."""

    kind: Kind = "embedding"

    @classmethod
    def wrap(cls, module: nn.Module) -> Self:
        """Take over an `nn.Embedding`, sharing its parameter. Raises ValueError where a lookup is not the whole map."""
        problem = unsupported_embedding(module)
        if problem:
            raise ValueError(problem)
        return cls(module, DenseWeight(module.weight))  # type: ignore[arg-type]

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of the base, or of the active update's matrix."""
        name = self.active
        if name is None:
            return self.weight.rows(ids)
        return self.updates[name].rows(ids, self.weight)  # type: ignore[operator]

    def stock(self) -> dict[str, Tensor]:
        """`weight`."""
        return {"weight": self.weight.tensor()}


def unsupported_embedding(module: nn.Module) -> str | None:
    """Why `Embedding` cannot stand in for this module, or None."""
    kind = type(module).__name__
    if not isinstance(module, nn.Embedding):
        return f"{kind} is not an embedding"
    if "forward" in vars(module):
        return f"{kind} has a forward of its own set on it (by a device map or a hook); load the model without that"
    if type(module).forward is not nn.Embedding.forward:
        return f"{kind} overrides nn.Embedding.forward, which an update would bypass"
    if module.max_norm is not None:
        return f"{kind} has max_norm, which rewrites the frozen rows during a forward"
    return None
