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
import warnings
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
from reparam.core.checks import finite, listed, whole
from reparam.core.progress import tracked
from reparam.core.text import counted
from reparam.errors import FormatError, InputDependentError
from reparam.io import files
from reparam.io.record import Record
from reparam.methods import patterns
from reparam.methods.lora import LoRA, seeded
from reparam.sites.fingerprint import base_tensors

LARGEST = torch.finfo(torch.float32).max
CANCELED = 1e-6
"""A sum whose norm is at most this share of that of its parts is zero but for rounding."""
NOTHING = (
    "the sum of the adapters changes nothing, because their weighted changes cancel or are zero; give other weights"
)
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
    parts: float = 0.0
    """Sum of the Frobenius norms of the weighted changes, Σ |w_i| |ΔW_i|."""

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
    idle: bool = False
    """Whether the sum changes nothing: the weighted changes are zero, or cancel but for rounding."""

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
        told = "changes nothing" if self.idle else f"error {self.error:.4g}"
        return f"Blend({self.space}, {counted(len(self.record.sites), 'site')}, {told})"

    def save(self, folder: str | Path, *, format: str = "reparam") -> None:
        """Write the result as an adapter; `format` is "reparam" or "peft". Raises the errors of `Adapter.save`.

        Warns if the sum changes nothing.
        """
        if self.idle:
            warnings.warn(f"{folder}: {NOTHING}", stacklevel=2)
        files.write(folder, self.record, format=format)

    def put(self, model: nn.Module, *, name: str = "default", activate: bool = True) -> Adapter:
        """Put the result on `model` as a frozen adapter. Raises FormatError as `load` does."""
        return place(model, self.record, Path(f"blend {name!r}"), name=name, activate=activate)


def read_operand(folder: str | Path) -> Operand:
    """Read the adapter in `folder`, in either format. Raises FormatError if there is none or a file is damaged."""
    return Operand(str(folder), files.read(folder).without_beside(folder))


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

    Raises ValueError if a setting is out of range, there is not one weight per adapter, or the sum overflows float32,
    and FormatError (a ValueError) if adapters cannot be summed: they have different bases or shapes, depend on the
    input, train whole modules, or have a gain or biases while `base` is missing.
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
        return Blend(used[0][0].record, (), space, _is_zero(used[0][0]))
    for operand, _ in used:
        check_identity(operand, base)

    rule = _Rule(space, rank, density, seed)
    sites, found, tensors = all_sites(operands), [], {}
    for name, site in tracked(sites.items(), "combining", unit="sites"):
        here = [(s, w) for s, w in used if name in s.record.sites]
        weight = None if base is None else base_weight(base, site)
        changes = [factors_of(label, record, name, weight) for (label, record), _ in here]
        factors, size, lost, parts = rule(changes, [w for _, w in here], site, weight)
        found.append(SiteBlend(name, len(factors.A), size, lost, parts))
        tensors[f"{name}.A"], tensors[f"{name}.B"] = factors.A.float().contiguous(), factors.B.float().contiguous()
    biases, moved = _biases(used, sites, base)
    tensors |= biases
    _check_finite(tensors, found)
    parts = math.hypot(*(site.parts for site in found))
    idle = not moved and math.hypot(*(site.change for site in found)) <= CANCELED * parts
    ranks = {site.name: site.rank for site in found}
    most = max(ranks.values())
    differing = patterns.exactly({name: r for name, r in ranks.items() if r != most})
    method = LoRA(r=most, alpha=float(most), scaling="none", rank_pattern=differing)
    bases = [record.base for _, record in operands if record.base is not None]
    told = max(bases, key=lambda b: bool(b.digests)) if bases else None
    asked = {record.prompt_format for _, record in operands}
    summed = Record(
        method,
        sites,
        tensors,
        base=told,
        tied=all_ties(operands),
        prompt_format=asked.pop() if len(asked) == 1 else None,
    )
    return Blend(summed, tuple(found), space, idle)


@dataclasses.dataclass(frozen=True)
class _Rule:
    """The rule that sums the changes of one site."""

    space: str
    rank: int | None
    density: float
    seed: int

    def __call__(
        self, changes: list[Factors], weights: list[float], site: Site, weight: Weight | None
    ) -> tuple[Factors, float, float, float]:
        """The factors of the sum, |ΔW|, the norm of the approximation error, and Σ |w_i| |ΔW_i|."""
        high = any(f.gain is not None for f in changes)
        total = sum(len(f.A) for f in changes)
        if not total and not high:  # no adapter with a nonzero weight changes this site
            return Factors(torch.zeros(1, site.in_features), torch.zeros(site.out_features, 1)), 0.0, 0.0, 0.0
        most = min(site.out_features, site.in_features, self.rank or max(1, total))
        if not high:
            parts = _size(site.name, [abs(w) * f.low_rank_norm() for w, f in zip(weights, changes, strict=True)])
        if self.space == "factor":
            return *reduced(summed(changes, weights), most), parts
        if self.space == "delta" and not high:
            return *reduced(stacked(changes, weights), most), parts
        w0 = torch.zeros(1, 1, dtype=torch.float64) if weight is None else weight.tensor()
        dense = [f.change(w0) if high else f.B @ f.A for f in changes]
        parts = _size(site.name, [abs(w) * float(d.norm()) for w, d in zip(weights, dense, strict=True)])
        if self.space == "ties":
            summed_up = ties(dense, weights, self.density)
        elif self.space == "dare":
            summed_up = dare(dense, weights, self.density, seeded(self.seed, site))
        else:
            summed_up = torch.stack([w * d for w, d in zip(weights, dense, strict=True)]).sum(0)
        return *factored(summed_up, most), parts


def _size(name: str, norms: Sequence[float]) -> float:
    """The sum of the norms. Raises ValueError if it overflows float32."""
    if not sum(norms) <= LARGEST:
        raise ValueError(f"blend: the sum overflows float32 at {name}; give smaller weights")
    return sum(norms)


def _check_finite(tensors: Mapping[str, Tensor], sites: Sequence[SiteBlend]) -> None:
    """Raise ValueError if a tensor or the norm of a change overflows float32."""
    bad = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    bad += [site.name for site in sites if not site.change <= LARGEST]
    if bad:
        raise ValueError(f"blend: the sum overflows float32 at {listed(bad)}; give smaller weights")


def _is_zero(operand: Operand) -> bool:
    """Whether a single adapter changes nothing, as far as its factors tell."""
    label, record = operand
    try:
        changes = [factors_of(label, record, name) for name in record.sites]
    except (FormatError, InputDependentError):
        return False
    others = [key for key in record.tensors if key.endswith(".bias")]
    return not record.replaced and not others and not any(f.low_rank_norm() for f in changes)


def _biases(
    used: Sequence[tuple[Operand, float]], sites: Mapping[str, Site], base: nn.Module | None
) -> tuple[dict[str, Tensor], bool]:
    """Summed biases b₀ + Σ w_i (b_i − b₀) [O] of all sites with a bias, by name, and whether one differs from b₀.

    Empty if no adapter trained biases.
    """
    keys = [f"{name}.bias" for name in sites]
    if base is None or not any(key in operand.record.tensors for operand, _ in used for key in keys):
        return {}, False
    found, moved = {}, False
    for key, tensor in base_tensors(base):
        if key in keys:
            before = tensor.detach().double().cpu()
            trained = [(s.record.tensors[key].double(), w) for s, w in used if key in s.record.tensors]
            found[key] = torch.stack([before, *(w * (bias - before) for bias, w in trained)]).sum(0).float()
            moved |= not torch.equal(found[key], before.float())
    return found, moved


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
