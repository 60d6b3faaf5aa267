"""Evaluate several weighted sums of adapters in one batch, where each row has its own weights.

The factors of all adapters are concatenated once. The outputs of A are then multiplied by the weights of the row:

    delta     y = W x + Σ_i w_i B_i (A_i x)                     factor    y = W x + Σ_i w_i B_i (Σ_j w_j A_j x)

A search thus evaluates a generation of candidates in one forward pass, with one row per candidate and example.

Shapes: N adapters, B rows, T tokens per row, R sum of the adapters' ranks at a site.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.adapter.attach import install, remove
from reparam.adapter.selection import state_of
from reparam.combine.lowrank import stacked
from reparam.combine.operands import (
    Operand,
    all_sites,
    all_ties,
    check_factors,
    check_identity,
    check_operands,
    factors_of,
)
from reparam.core.base import Factors, Site, Update, Weight
from reparam.core.method import Method
from reparam.errors import FormatError
from reparam.sites import targets
from reparam.sites.walk import walk

NAME = "candidates"


class Gates:
    """The adapter weights of each row of the next forward pass; all sites share one object."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.rows: Tensor | None = None
        """Weights [B, N], or None to compute the base model without adapters."""


@contextmanager
def candidates(model: nn.Module, operands: Sequence[Operand], *, space: str = "delta") -> Iterator[Gates]:
    """Put all adapters on `model` for the duration of the `with` block. Set `rows` of the yielded object.

    Afterwards the model, its own adapters and its active adapter are as before, even after an exception. Raises
    ValueError if the space is neither "delta" nor "factor" or `operands` is empty, and FormatError if the adapters
    cannot be summed (see `blend`), or one has a gain (DoRA) or trained biases.
    """
    if space not in ("delta", "factor"):
        raise ValueError(f"space={space!r}: expected 'delta' or 'factor'; weights cannot be searched in other spaces")
    if not operands:
        raise ValueError("no adapters are given")
    check_operands(operands, model)
    for label, record in operands:
        biases = [key for key in record.tensors if key.endswith(".bias") and key.removesuffix(".bias") in record.sites]
        if biases:
            raise FormatError(f"{label}: this adapter trains {biases[0]}; a search supports only low-rank updates")
    if space == "factor":
        check_factors(operands)
    parts: dict[str, list[tuple[int, Factors]]] = {}
    for name in all_sites(operands):
        owners = [(i, s) for i, s in enumerate(operands) if name in s.record.sites]
        parts[name] = [(i, factors_of(s.label, s.record, name)) for i, s in owners]
    for operand in operands:
        check_identity(operand, None)
    have = dict(walk(model))
    _check_model(have, all_sites(operands))
    gates = Gates(len(operands))
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    tied = {path: tie.to for path, tie in all_ties(operands).items()}
    names = [*parts, *tied]
    install(model, _Together(parts, gates, space), names=names, replaced=[], name=NAME, bias=False, tied=tied)
    try:
        with state_of(model).select(NAME):
            yield gates
    finally:
        remove(model, NAME)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trains)


def _check_model(have: dict[str, nn.Module], sites: dict[str, Site]) -> None:
    for name, site in sites.items():
        expected = site.kind, site.out_features, site.in_features
        problem = "is not in the base" if name not in have else targets.unsupported_reason(have[name])
        if problem is None and (found := targets.sizes(have[name])) != expected:
            problem = f"is {found[0]}, {found[1]} x {found[2]}, in the base, not {expected[1]} x {expected[2]}"
        if problem:
            raise FormatError(f"site {name} of the adapters {problem}; were they trained on another base?")


@dataclasses.dataclass(frozen=True)
class _Together(Method):
    """The method that builds the combined update of each site for `install`. It is not registered or saved."""

    ties: ClassVar[bool] = True
    takes_context: ClassVar[bool] = True  # the weights of the rows
    parts: dict[str, list[tuple[int, Factors]]]
    gates: Gates
    space: str

    def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> _Weighed:
        """Build the combined update of all adapters that change this site."""
        owners, factors = zip(*self.parts[site.name], strict=True)
        return _Weighed(owners, factors, self.gates, weight, squared=self.space == "factor")


class _Weighed(Update):
    """The factors of all adapters at one site, weighted per row. For inference only."""

    A: Tensor  # [R, I]
    B: Tensor  # [O, R]
    owner: Tensor  # [R], index of the adapter that each component belongs to

    def __init__(
        self, owners: Sequence[int], factors: Sequence[Factors], gates: Gates, weight: Weight, *, squared: bool
    ) -> None:
        super().__init__()
        together = stacked(factors, [1.0] * len(factors))
        of = [owner for owner, f in zip(owners, factors, strict=True) for _ in range(len(f.A))]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.register_buffer("A", together.A.to(weight.device, dtype), persistent=False)
        self.register_buffer("B", together.B.to(weight.device, dtype), persistent=False)
        self.register_buffer("owner", torch.tensor(of, dtype=torch.int64, device=weight.device), persistent=False)
        self.gates = gates
        self.squared = squared

    def forward(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [B, T, I] or [B · T, I] -> y [..., O], computed with each row's own sum of adapters."""
        y = weight(x, bias)
        if self.gates.rows is None:
            return y
        h = self._weighed(F.linear(x, self.A.to(x.dtype)).flatten(0, -2), self.gates.rows)
        return y + F.linear(h, self.B.to(x.dtype)).view_as(y).to(y.dtype)

    def rows(self, ids: Tensor, weight: Weight) -> Tensor:
        """ids [B, T] -> embeddings [B, T, I] under each row's own sum: rows of B are looked up and multiplied by A."""
        y = weight.rows(ids)
        if self.gates.rows is None:
            return y
        h = self._weighed(F.embedding(ids, self.B).flatten(0, -2), self.gates.rows)
        return y + (h @ self.A).view_as(y).to(y.dtype)

    def _weighed(self, h: Tensor, rows: Tensor) -> Tensor:
        """Weight the hidden values h [B · T, R] between the two factors; both orders of A and B use this."""
        g = self._of_tokens(len(h), rows).to(h.dtype)
        h = h * g
        if not self.squared:
            return h
        mixed = h.view(len(h), self.gates.n, -1).sum(1, keepdim=True)  # Σ w_j A_j x; all adapters have the same rank
        return mixed.expand(-1, self.gates.n, -1).flatten(1) * g

    def _of_tokens(self, count: int, rows: Tensor) -> Tensor:
        """The weight of each component for each of `count` tokens, [count, R]."""
        if count % len(rows):
            raise ValueError(f"candidates: {count} tokens cannot be divided among {len(rows)} rows of weights")
        return rows.to(self.A.device, self.A.dtype)[:, self.owner].repeat_interleave(count // len(rows), 0)
