"""Compute the singular values of ΔW, and measures of how many of them matter.

For ΔW = B A, all singular values are computed exactly from the factors, without forming ΔW (`lowrank.singular`). DoRA's
gain g makes ΔW = (diag(g) - 1) W + g B A, which has full rank. With the base, its leading singular values are computed
by applying ΔW to vectors (`operators.py`), and |ΔW| is exact, which gives the share that these values hold. Without
the base, g is not known; the spectrum is then that of s B A, the change of DoRA's direction.

    effective rank   exp(-Σ p_i ln p_i), p_i = σ_i / Σ σ      (Roy and Vetterli 2007): R equal values give R
    stable rank      Σ σ² / σ_1²
    needed(0.9)      number of largest values that hold 90 % of Σ σ² = |ΔW|²
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
from reparam.core.progress import tracked
from reparam.errors import InputDependentError
from reparam.inspect.operators import leading, of_change
from reparam.inspect.summary import frozen_weight
from reparam.io.record import Record
from reparam.sites.fingerprint import base_tensors

LEADING = 32
"""Number of leading singular values to compute if ΔW has full rank."""

SpectrumKind = Literal["all", "leading", "low-rank part"]


class Spectrum(NamedTuple):
    """Singular values of one site's ΔW with their directions, in float64."""

    u: Tensor  # [O, K]
    values: Tensor  # [K], descending
    vh: Tensor  # [K, I]
    energy: float
    """|ΔW|², the squared Frobenius norm: Σ σ² over all singular values, including those not in `values`."""
    kind: SpectrumKind
    """all: all values of ΔW. leading: the `LEADING` largest values of ΔW. low-rank part: all values of s B A, because
    ΔW is not known without the base."""

    @property
    def rank(self) -> int:
        """Number of values above float32 rounding."""
        return numeric_rank(self.values)

    @property
    def held(self) -> float:
        """Share of the energy that `values` hold, from 0 to 1; less than 1 only for the kind "leading"."""
        return min(1.0, float(self.values.square().sum()) / self.energy) if self.energy else 1.0

    @property
    def effective(self) -> float | None:
        """Effective rank; None for the kind "leading", which does not have all values; 0 if ΔW is zero."""
        if self.kind == "leading":
            return None
        return effective_rank(self.values)

    @property
    def stable(self) -> float:
        """Stable rank; 0 if ΔW is zero."""
        return self.energy / float(self.values[0]) ** 2 if self.rank else 0.0

    def needed(self, share: float) -> int | None:
        """Number of largest values that hold this share of the energy; None if the known values hold less."""
        kept = self.values.square().cumsum(0)
        enough = int((kept < share * self.energy * (1 - 1e-12)).sum()) + bool(self.energy)
        return enough if enough <= len(kept) else None


def effective_rank(values: Tensor) -> float:
    """Effective rank of singular values [K]: exp of the entropy of σ / Σ σ. 0 if all values are zero.

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
    """Compute the spectrum of one site of a saved adapter; `weight` is its frozen matrix, or None without the base.

    Returns None for an update that depends on its input, and for one that only trains magnitudes if there is no base.
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
    """Compute the spectra of all sites that have one. `model` is the base without adapters, or None."""
    sites = tracked(weights(record, model).items(), "decomposing", unit="sites")
    found = {name: spectrum(record, name, weight) for name, weight in sites}
    return {name: seen for name, seen in found.items() if seen is not None}


def weights(record: Record, model: nn.Module | None) -> Mapping[str, Weight | None]:
    """Frozen matrix of each site of an adapter, by name; each is None without a base."""
    own = dict(base_tensors(model)) if model is not None else {}
    return {name: frozen_weight(model, own, site) for name, site in record.sites.items()}
