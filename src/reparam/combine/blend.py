"""Compute a weighted sum of saved adapters of one base model. The result is an ordinary adapter.

    space="delta"    ΔW = Σ w_i ΔW_i, exactly: the factors are concatenated, with the scales multiplied in
    space="factor"   ΔW = (Σ w_i s_i B_i) (Σ w_i A_i), as in LoraHub's code (arXiv 2307.13269): quadratic in w, and
                     useful if all A_i started from the same initialization
    space="ties"     trim, elect a sign, average (TIES, arXiv 2306.01708)
    space="dare"     drop entries at random, rescale, add (DARE, arXiv 2311.03099)

The result is a LoRA with scale 1 whose ranks may differ between sites. "delta" gives the sum of the ranks, or the best
approximation of the requested rank. Trimming and dropping entries destroys the low rank, so "ties" and "dare" build ΔW
for one site at a time and keep its best approximation of that rank. The result states the approximation error of each
site.

A single adapter with weight 1 is copied bit for bit. An update with a gain (DoRA scales W₀ too) needs the base model:
its ΔW = (diag(gain) - 1) W₀ + B A is a dense matrix.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from reparam.adapter.adapter import Adapter
from reparam.adapter.load import place
from reparam.combine.lowrank import dare, factored, reduced, stacked, summed, ties
from reparam.combine.operands import (
    Operand,
    all_sites,
    all_ties,
    base_weight,
    check_factors,
    check_identity,
    check_operands,
    factors_of,
)
from reparam.core.base import Factors, Site, Weight
from reparam.core.checks import finite, whole
from reparam.io import files
from reparam.io.record import Record
from reparam.methods import patterns
from reparam.methods.lora import LoRA, seeded
from reparam.sites.fingerprint import base_tensors

DENSE = ("ties", "dare")
SPACES = ("delta", "factor", *DENSE)


@dataclasses.dataclass(frozen=True)
class SiteBlend:
    """Rank and approximation error of one site of a blend."""

    name: str
    rank: int
    """Rank of the result."""
    change: float
    """Frobenius norm of the requested ΔW."""
    lost: float
    """Frobenius norm of the difference between the requested ΔW and the result."""

    @property
    def error(self) -> float:
        """Relative error |lost| / |ΔW|; 0 if ΔW is zero."""
        return self.lost / self.change if self.change else 0.0


@dataclasses.dataclass(frozen=True)
class Blend:
    """A weighted sum of adapters, and its approximation error for each site."""

    record: Record
    sites: tuple[SiteBlend, ...]
    space: str

    @property
    def error(self) -> float:
        """Relative error |lost| / |ΔW| over all sites."""
        change = math.hypot(*(site.change for site in self.sites))
        return math.hypot(*(site.lost for site in self.sites)) / change if change else 0.0

    @property
    def survival(self) -> float:
        """⟨written, ΔW⟩ / ⟨ΔW, ΔW⟩ over all sites: 1 - error², because the error is orthogonal to the result."""
        return 1 - self.error**2

    def __repr__(self) -> str:
        return f"Blend({self.space}, {len(self.record.sites)} sites, error {self.error:.4g})"

    def save(self, folder: str | Path, *, format: str = "reparam") -> None:
        """Write the result as an adapter; `format` is "reparam" or "peft". Raises the errors of `Adapter.save`."""
        files.write(folder, self.record, format=format)

    def put(self, model: nn.Module, *, name: str = "default", activate: bool = True) -> Adapter:
        """Put the result on `model` as a frozen adapter. Raises FormatError as `load` does."""
        return place(model, self.record, Path(f"blend {name!r}"), name=name, activate=activate)


def read_operand(folder: str | Path) -> Operand:
    """Read the adapter in `folder`, in either format. Raises FormatError if there is none or a file is damaged."""
    return Operand(str(folder), files.read(folder))


@torch.no_grad()
def blend(
    adapters: Sequence[str | Path | Record],
    weights: Sequence[float],
    *,
    space: str = "delta",
    rank: int | None = None,
    density: float = 0.2,
    seed: int = 0,
    base: nn.Module | None = None,
) -> Blend:
    """Compute the weighted sum of saved adapters, which may differ in method, rank, scale and sites.

    Args:
        adapters: folders in reparam's or PEFT's format, or records that `io.files.read` returned.
        weights: one finite number per adapter.
        space: "delta", "factor", "ties" or "dare"; see the module's docstring.
        rank: the highest rank of a site. Default: the rank of the exact sum, or the sum of the ranks for dense changes.
        density: for ties and dare: the share of entries to keep, in (0, 1].
        seed: for dare: seed of the random choice of entries, which also depends on the site's name.
        base: the model that the adapters were trained on; needed if an adapter has a gain (DoRA) or trained biases.

    Raises ValueError if a setting is out of range or there is not one weight per adapter, and FormatError (a
    ValueError) if adapters cannot be summed: they have different bases or shapes, depend on the input, train whole
    modules, or have a gain or biases while `base` is missing.
    """
    _check_settings(len(adapters), weights, space=space, rank=rank, density=density)
    operands = [
        Operand(f"adapter {i + 1}", a) if isinstance(a, Record) else read_operand(a) for i, a in enumerate(adapters)
    ]
    if len(operands) > 1 or weights[0] != 1 or rank is not None or space in DENSE:
        check_operands(operands, base)
    if space == "factor":
        check_factors(operands)
    used = [(operand, w) for operand, w in zip(operands, weights, strict=True) if w]
    if [w for _, w in used] == [1] and rank is None and space not in DENSE:
        return Blend(used[0][0].record, (), space)
    for operand, _ in used:
        check_identity(operand, base)

    rule = _Rule(space, rank, density, seed)
    sites, found, tensors = all_sites(operands), [], {}
    for name, site in sites.items():
        here = [(s, w) for s, w in used if name in s.record.sites]
        weight = None if base is None else base_weight(base, site)
        changes = [factors_of(label, record, name, weight) for (label, record), _ in here]
        factors, size, lost = rule(changes, [w for _, w in here], site, weight)
        found.append(SiteBlend(name, len(factors.A), size, lost))
        tensors[f"{name}.A"], tensors[f"{name}.B"] = factors.A.float().contiguous(), factors.B.float().contiguous()
    tensors |= _biases(used, sites, base)
    ranks = {site.name: site.rank for site in found}
    most = max(ranks.values())
    differing = patterns.exactly({name: r for name, r in ranks.items() if r != most})
    method = LoRA(r=most, alpha=float(most), scaling="none", rank_pattern=differing)
    bases = [record.base for _, record in operands if record.base is not None]
    told = max(bases, key=lambda b: bool(b.digests)) if bases else None
    return Blend(Record(method, sites, tensors, base=told, tied=all_ties(operands)), tuple(found), space)


@dataclasses.dataclass(frozen=True)
class _Rule:
    """The rule that sums the changes of one site."""

    space: str
    rank: int | None
    density: float
    seed: int

    def __call__(
        self, changes: list[Factors], weights: list[float], site: Site, weight: Weight | None
    ) -> tuple[Factors, float, float]:
        """The factors of the sum, |ΔW|, and the norm of the approximation error."""
        high = any(f.gain is not None for f in changes)
        total = sum(len(f.A) for f in changes)
        if not total and not high:  # no adapter with a nonzero weight changes this site
            return Factors(torch.zeros(1, site.in_features), torch.zeros(site.out_features, 1)), 0.0, 0.0
        most = min(site.out_features, site.in_features, self.rank or max(1, total))
        if self.space == "factor":
            return reduced(summed(changes, weights), most)
        if self.space == "delta" and not high:
            return reduced(stacked(changes, weights), most)
        w0 = torch.zeros(1, 1, dtype=torch.float64) if weight is None else weight.tensor()
        dense = [f.change(w0) if high else f.B @ f.A for f in changes]
        if self.space == "ties":
            return factored(ties(dense, weights, self.density), most)
        if self.space == "dare":
            return factored(dare(dense, weights, self.density, seeded(self.seed, site)), most)
        return factored(torch.stack([w * d for w, d in zip(weights, dense, strict=True)]).sum(0), most)


def _biases(
    used: Sequence[tuple[Operand, float]], sites: Mapping[str, Site], base: nn.Module | None
) -> dict[str, Tensor]:
    """Summed biases b₀ + Σ w_i (b_i − b₀) [O] of all sites with a bias, by name; empty if no adapter trained biases."""
    keys = [f"{name}.bias" for name in sites]
    if base is None or not any(key in operand.record.tensors for operand, _ in used for key in keys):
        return {}
    found = {}
    for key, tensor in base_tensors(base):
        if key in keys:
            before = tensor.detach().double().cpu()
            trained = [(s.record.tensors[key].double(), w) for s, w in used if key in s.record.tensors]
            found[key] = torch.stack([before, *(w * (bias - before) for bias, w in trained)]).sum(0).float()
    return found


def _check_settings(n: int, weights: Sequence[float], *, space: str, rank: int | None, density: float) -> None:
    problems = ["no adapters are given"] * (n == 0)
    if n != len(weights):
        problems.append(f"expected one weight per adapter ({n}), found {len(weights)}")
    problems += [f"weight {i + 1} is {w!r}: expected a finite number" for i, w in enumerate(weights) if not finite(w)]
    if space not in SPACES:
        problems.append(f"space={space!r}: expected one of {', '.join(SPACES)}")
    if rank is not None and not whole(rank, 1):
        problems.append(f"rank={rank!r}: expected a whole number of at least 1")
    if not finite(density) or not 0 < density <= 1:
        problems.append(f"density={density!r}: expected a number above 0 and up to 1")
    if problems:
        raise ValueError("blend: " + "; ".join(problems))
