"""The singular values of ΔW, and how many of them matter.

Where ΔW = B A, all of them come from the factors, exactly and without ΔW (`lowrank.singular`). DoRA's gain changes W,
ΔW = (diag(g) - 1) W + g B A, and gives it full rank. With the base the leading values are found by applying ΔW
(`operators.py`), and its norm is exact, so that it is known which share they hold. Without the base, g is not known:
what is described then is s B A, the change of DoRA's direction.

    effective rank   exp(-Σ p_i ln p_i), p_i = σ_i / Σ σ      (Roy and Vetterli 2007): R equal values give R
    stable rank      Σ σ² / σ_1²
    needed(0.9)       how many of the largest hold 90 % of Σ σ² = |ΔW|²
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from reparam.adapter.updates import update_of
from reparam.combine.lowrank import numeric_rank, singular
from reparam.combine.operands import nothing
from reparam.core.base import Factors, Weight
from reparam.errors import InputDependentError
from reparam.inspect.operators import leading, of_change
from reparam.inspect.summary import frozen_weight
from reparam.io.record import Record
from reparam.sites.fingerprint import base_tensors

LEADING = 32
"""How many values are looked for where ΔW has full rank."""

SpectrumKind = Literal["all", "leading", "low-rank part"]


class Spectrum(NamedTuple):
    """Singular values of one site's ΔW with their directions, in float64."""

    u: Tensor  # [O, K]
    values: Tensor  # [K], descending
    vh: Tensor  # [K, I]
    energy: float
    """|ΔW|², Frobenius: Σ of all σ², whether they are in `values` or not."""
    kind: SpectrumKind
    """all of ΔW; the leading ones of it; or all of s B A alone, where ΔW is not known without the base."""

    @property
    def rank(self) -> int:
        """How many of the values are more than rounding in float32."""
        return numeric_rank(self.values)

    @property
    def held(self) -> float:
        """The share of the energy that the values hold; 1 but for `leading`."""
        return min(1.0, float(self.values.square().sum()) / self.energy) if self.energy else 1.0

    @property
    def effective(self) -> float | None:
        """The effective rank; None where not all values are known, 0 without a change."""
        if self.kind == "leading":
            return None
        return effective_rank(self.values)

    @property
    def stable(self) -> float:
        """The stable rank; 0 without a change."""
        return self.energy / float(self.values[0]) ** 2 if self.rank else 0.0

    def needed(self, share: float) -> int | None:
        """How many of the largest values hold this share of the energy; None where those that are known do not."""
        kept = self.values.square().cumsum(0)
        enough = int((kept < share * self.energy * (1 - 1e-12)).sum()) + bool(self.energy)
        return enough if enough <= len(kept) else None


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of σ / Σ σ; 0 where all are zero.

    >>> round(effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])), 6)
    3.0
    """
    total = float(values.sum())
    if not total:
        return 0.0
    p = values[values > 0] / total
    return float((-(p * p.log()).sum()).exp())


@torch.no_grad()
def spectrum(record: Record, name: str, weight: Weight | None = None) -> Spectrum | None:
    """The spectrum of one site of a saved adapter; `weight` is its frozen matrix, where the base is at hand.

    None where no one matrix is the change: for updates that depend on their input, and for magnitudes alone without
    their base.
    """
    known = nothing(record.sites[name]) if weight is None else weight
    update = update_of(record, name, known)
    kind: SpectrumKind = "all"
    try:
        factors = update.factors(known)
        if factors.gain is not None and weight is None:
            part = update.low_rank_part()
            if part is None:
                return None
            kind, factors = "low-rank part", part[0].factors(known)
    except InputDependentError:
        return None
    factors = Factors(*(None if part is None else part.detach().double() for part in factors))  # type: ignore[arg-type]
    if factors.gain is None:
        u, values, vh = singular(factors)
        return Spectrum(u, values, vh, float(values.square().sum()), kind)
    assert weight is not None
    squares = [factors.change(block.detach().double(), rows).square().sum() for rows, block in weight.blocks()]
    u, values, vh = leading(of_change(weight, factors), LEADING)
    return Spectrum(u, values, vh, float(torch.stack(squares).sum()), "leading")


def spectra(record: Record, model: nn.Module | None = None) -> dict[str, Spectrum]:
    """The spectra of all sites that have one. `model` is the base, plain, or None."""
    found = {name: spectrum(record, name, weight) for name, weight in weights(record, model).items()}
    return {name: seen for name, seen in found.items() if seen is not None}


def weights(record: Record, model: nn.Module | None) -> Mapping[str, Weight | None]:
    """The base's matrices at the sites of an adapter; None without a base."""
    own = dict(base_tensors(model)) if model is not None else {}
    return {name: frozen_weight(model, own, site) for name, site in record.sites.items()}
