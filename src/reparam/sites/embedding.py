"""The site of an embedding: E' [V, I] = diag(gain) E + B A, computed only for the rows that are looked up.

A subclass of `nn.Embedding` may change the rows that it looks up, such as Gemma's and BART's, which multiply them by a
factor. The subclass's own forward then receives the N rows of E' that are needed as its matrix, and their numbers
0 ... N - 1 as ids. A forward that looks up other rows than its input names, such as OPT's positions with an offset, is
refused.
"""

from __future__ import annotations

import inspect
from typing import Self

import torch
from torch import Tensor, nn

from reparam.core.base import Site, Update
from reparam.core.placing import patched
from reparam.sites.kinds import kind
from reparam.sites.module import Adapted, without_hooks
from reparam.weights.dense import Layout


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
        if patched(module):
            return f"{name} has a patched forward, which an update would bypass; load the model without the patch"
        if _overrides(module) and (why := _override_problem(module)):
            return f"{name} overrides nn.Embedding.forward: {why}"
        if module.max_norm is not None:
            return f"{name} has max_norm, which rewrites the frozen rows during a forward"
        return None

    @classmethod
    def describe(cls, name: str, module: nn.Module) -> Site:
        """One row per id: O = V, I = width."""
        return Site(name, cls.kind, *module.weight.shape)  # type: ignore[misc]

    def __init__(self, origin: nn.Embedding, layout: Layout = "rows") -> None:
        super().__init__(origin, layout)
        self._buffers, self._non_persistent_buffers_set = origin._buffers, origin._non_persistent_buffers_set
        self.body = (_body(origin),) if _overrides(origin) else ()  # in a tuple so that it is not a submodule

    @classmethod
    def adopt(cls, module: nn.Module) -> Self:
        """Take over an `nn.Embedding`, sharing its parameter."""
        return cls(module)  # type: ignore[arg-type]

    def check_update(self, update: Update) -> None:
        """Raise InputDependentError if the update cannot compute rows of W'."""
        update.rows(torch.zeros(1, dtype=torch.int64, device=self.frozen.device), self.frozen)

    def forward(self, ids: Tensor) -> Tensor:
        """The output for the rows of the base matrix or, if an adapter is active, of its W'."""
        rows = self._rows(ids)
        if not self.body:
            return rows
        places = rows.shape[:-1]  # those of the ids; or, for ids that the rows of a mixed batch share, [B, T]
        numbers = torch.arange(places.numel(), device=ids.device).view(places)
        return torch.func.functional_call(self.body[0], {"weight": rows.flatten(0, -2)}, (numbers,))

    def _rows(self, ids: Tensor) -> Tensor:
        name = self.active
        if name is None:
            return self.frozen.rows(ids)
        found: Tensor = self.updates[name].rows(ids, self.frozen)  # type: ignore[operator]
        padding: int | None = self.origin[0].padding_idx  # type: ignore[assignment]
        if padding is None or not found.requires_grad:
            return found
        return torch.where((ids == padding).unsqueeze(-1), found.detach(), found)  # as nn.Embedding: no gradient there


def _overrides(module: nn.Module) -> bool:
    return type(module).forward is not nn.Embedding.forward


def _body(module: nn.Embedding) -> nn.Embedding:
    """A module that shares the buffers and settings of this one, and computes with the matrix that it is given."""
    body: nn.Embedding = without_hooks(module)  # type: ignore[assignment]
    body._parameters = {"weight": None}
    body.padding_idx = None  # its number is that of a row of the whole matrix
    return body


@torch.no_grad()
def _override_problem(module: nn.Embedding) -> str | None:
    """Why the module's own forward cannot compute with rows that were looked up for it, or None if it can."""
    name = type(module).__name__
    if [*module._parameters] != ["weight"] or any(True for _ in module.children()):
        return f"{name} has parameters beside its matrix, which adapters do not support"
    takes = inspect.signature(module.forward).parameters.values()
    if sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in takes) > 1:
        offset = getattr(module, "offset", None)
        shift = f", with an offset of {offset}" if isinstance(offset, int) else ""
        return (
            f"it computes the rows that it looks up{shift}, such as positions, so they cannot be known from its input"
        )
    count = 4
    matrix = torch.linspace(-1, 1, count * module.embedding_dim, dtype=module.weight.dtype, device=module.weight.device)
    matrix = matrix.view(count, module.embedding_dim)
    ids = torch.tensor([[2, 0, 3, 1]], device=matrix.device)
    body = _body(module)
    try:
        found, plain = (torch.func.functional_call(body, {"weight": matrix}, (i,)) for i in (ids, ids.sort().values))
        same = found.shape == (1, count, module.embedding_dim) and (
            found.is_meta or torch.equal(found, plain[:, ids[0]])
        )
    except (IndexError, RuntimeError, TypeError, ValueError, AttributeError):
        same = False
    return None if same else "it looks up other rows than its input names, or does more than change each of them"
