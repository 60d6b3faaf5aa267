"""Trains the rows of single tokens in an embedding, and nothing else, as PEFT's trainable tokens.

    W'[t] = v_t for the tokens t in `ids`, W'[t] = W[t] for all others        v [n, I], at first the rows of W

For new tokens, or for the few that a task needs: n I parameters instead of V I. With `attach(..., tie=True)` the same
rows act in an output head that shares its weight with the embedding, as PEFT does. The rows are saved themselves, not
their changes, so that they do not depend on the values with which new rows of the base happened to start.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.core.base import Factors, Role, Site, Update, Weight
from reparam.core.checks import listed, whole
from reparam.core.dtypes import wide
from reparam.core.method import Method
from reparam.core.registry import method


@method("tokens")
@dataclasses.dataclass(frozen=True)
class Tokens(Method):
    """Trains the rows of single tokens in an embedding (PEFT's `trainable_token_indices`).

    Raises ValueError for ids that are missing, negative, or listed twice; `attach` raises it for an id that a targeted
    module has no row for.

    >>> import torch, reparam
    >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50))
    >>> adapter = reparam.attach(model, reparam.Tokens(ids=(3, 49)), targets=["0"])
    >>> sum(p.numel() for p in adapter.parameters())  # two rows
    16
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"ids": (4, 1, 3)},)
    ties: ClassVar[bool] = True

    ids: tuple[int, ...] = ()
    """Ids of the tokens whose rows train."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ids", tuple(self.ids))
        odd = [repr(i) for i in self.ids if not whole(i, 0)]
        if odd:
            raise ValueError(f"Tokens: ids: expected whole numbers of at least 0, found {listed(odd)}")
        if len(set(self.ids)) < len(self.ids) or not self.ids:
            raise ValueError("Tokens: ids: list at least one token, and each of them once")

    @property
    def default_targets(self) -> tuple[str, ...]:
        """The input embedding, under the names that transformers gives it."""
        return (r"re:(.*\.)?(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared)",)

    def unsupported_reason(self, site: Site) -> str | None:
        """The reason if the module is a norm, which has no rows of tokens."""
        return f"a {site.kind} has no rows of tokens" if site.kind == "vector" else None

    def check(self, sites: list[Site]) -> None:
        """Raise ValueError for an id that a site has no row for."""
        for site in sites:
            if max(self.ids) >= site.out_features:
                raise ValueError(
                    f"Tokens: ids: {site.name} has {site.out_features} rows, so it has none for the token "
                    f"{max(self.ids)}; resize the embedding first (resize_token_embeddings), or check the id"
                )

    def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> TokensUpdate:
        """A new update, with the rows of W."""
        ids = torch.tensor(self.ids, device=weight.device)
        return TokensUpdate(wide(weight.rows(ids)).detach().clone(), ids)


class TokensUpdate(Update):
    """The rows v [n, I] of n tokens, in float32 or wider."""

    roles: ClassVar[Mapping[str, Role]] = {"values": "core"}
    ids: Tensor
    found: Tensor
    order: Tensor

    def __init__(self, values: Tensor, ids: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)  # [n, I]
        self.register_buffer("ids", ids, persistent=False)  # [n]
        found, order = ids.sort()
        self.register_buffer("found", found, persistent=False)  # [n], in order, for the search
        self.register_buffer("order", order, persistent=False)

    def forward(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [..., I] -> x W'ᵀ + bias [..., O]. Adds the change of the trained rows, which is exactly 0 at first."""
        y = weight(x, bias)
        change = (self.values - weight.rows(self.ids).to(self.values.dtype)).to(x.dtype)
        return y.index_add(-1, self.ids, F.linear(x, change).to(y.dtype))

    def rows(self, ids: Tensor, weight: Weight) -> Tensor:
        """ids [...] -> rows of W' [..., I]: v for the trained tokens, W for all others."""
        plain = weight.rows(ids)
        at = torch.searchsorted(self.found, ids.contiguous()).clamp(max=len(self.values) - 1)
        own = F.embedding(self.order[at], self.values).to(plain.dtype)
        return torch.where((self.found[at] == ids).unsqueeze(-1), own, plain)

    def factors(self, weight: Weight) -> Factors:
        """v [n, I], the columns of the identity that pick its rows [O, n], and a gain [O] that removes the old ones."""
        one, count = self.values.new_ones(()), torch.arange(len(self.values), device=self.values.device)
        pick = self.values.new_zeros(weight.out_features, len(count)).index_put((self.ids, count), one)
        return Factors(self.values, pick, self.values.new_ones(weight.out_features).index_fill(0, self.ids, 0))
