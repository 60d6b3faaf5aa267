"""Arithmetic on saved adapters: a weighted sum of changes of one base, as an ordinary adapter.

    space="delta"    ΔW = Σ w_i ΔW_i, exactly: the factors side by side, with the scales in them
    space="factor"   ΔW = (Σ w_i s_i B_i) (Σ w_i A_i), as LoraHub's code has it (arXiv 2307.13269): quadratic in w, and
                     meaningful where the A_i come from one initialization
    space="ties"     trim, elect a sign, average (arXiv 2306.01708)
    space="dare"     drop at random, rescale, add up (arXiv 2311.03099)

The result is a LoRA without a scale, whose ranks may differ by site. "delta" gives the sum of the ranks, or the nearest
change of the rank that is asked for. Entries that are trimmed or dropped leave no low rank: "ties" and "dare" build ΔW,
one site at a time, and keep the nearest of that rank. Whatever that costs is in the result, site by site.

One adapter with weight 1 is itself, bit for bit. A change by more than a low-rank matrix (DoRA's gain scales W₀ too)
needs the base, ΔW = (diag(gain) - 1) W₀ + B A, and is dense then.
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
    """What one site of the result is."""

    name: str
    rank: int
    change: float
    """Frobenius norm of the ΔW that was asked for."""
    lost: float
    """Frobenius norm of what the rank left out of it."""

    @property
    def error(self) -> float:
        """|lost| / |ΔW|; 0 where there is no change."""
        return self.lost / self.change if self.change else 0.0


@dataclasses.dataclass(frozen=True)
class Blend:
    """A sum of adapters: an ordinary adapter, and what it cost to be one."""

    record: Record
    sites: tuple[SiteBlend, ...]
    space: str

    @property
    def error(self) -> float:
        """|lost| / |ΔW| over all sites."""
        change = math.hypot(*(site.change for site in self.sites))
        return math.hypot(*(site.lost for site in self.sites)) / change if change else 0.0

    @property
    def survival(self) -> float:
        """⟨written, ΔW⟩ / ⟨ΔW, ΔW⟩ over all sites: what is lost is orthogonal to what is kept, so 1 - error²."""
        return 1 - self.error**2

    def __repr__(self) -> str:
        return f"Blend({self.space}, {len(self.record.sites)} sites, error {self.error:.4g})"

    def save(self, folder: str | Path, *, format: str = "reparam") -> None:
        """Write it as any adapter; `format` is "reparam" or "peft". Raises ValueError as `Adapter.save` does."""
        files.write(folder, self.record, format=format)

    def put(self, model: nn.Module, *, name: str = "default", activate: bool = True) -> Adapter:
        """Put it on `model`, frozen. Raises FormatError as `load` does."""
        return place(model, self.record, Path(f"blend {name!r}"), name=name, activate=activate)


def read_operand(folder: str | Path) -> Operand:
    """The adapter in `folder`, in either format. Raises FormatError where there is none or it is damaged."""
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
    """The weighted sum of saved adapters, which may differ in method, rank, scale and sites.

    Args:
        adapters: folders, ours or PEFT's, or what `io.files.read` makes of them.
        weights: a finite number for each.
        space: delta, factor, ties or dare, as above.
        rank: the most that a site may have; by default what loses nothing, and for dense changes the sum of the ranks.
        density: ties and dare: the share of entries that stay.
        seed: dare: what stays. A site's draw depends on the seed and its name.
        base: the model they were trained on, for adapters with DoRA's gain or with biases.

    Raises ValueError for weights, ranks or densities that cannot be, and FormatError (a ValueError) for adapters that
    cannot be summed: on different bases, of different shapes, input dependent, with modules that are trained whole, or
    with a gain or biases and no base.
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
    return Blend(Record(method, sites, tensors, base=told), tuple(found), space)


@dataclasses.dataclass(frozen=True)
class _Rule:
    """How changes of one site become one."""

    space: str
    rank: int | None
    density: float
    seed: int

    def __call__(
        self, changes: list[Factors], weights: list[float], site: Site, weight: Weight | None
    ) -> tuple[Factors, float, float]:
        """The factors, |ΔW| and what of it the rank left out."""
        high = any(f.gain is not None for f in changes)
        total = sum(len(f.A) for f in changes)
        if not total and not high:  # whatever has a weight leaves this site alone
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
    """b₀ + Σ w_i (b_i − b₀) [O] by name, of all sites that have one, where any adapter trained biases."""
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
        problems.append(f"{n} adapters need as many weights, and there are {len(weights)}")
    problems += [f"weight {i + 1} is {w!r}: expected a finite number" for i, w in enumerate(weights) if not finite(w)]
    if space not in SPACES:
        problems.append(f"space={space!r}: expected one of {', '.join(SPACES)}")
    if rank is not None and not whole(rank, 1):
        problems.append(f"rank={rank!r}: expected a whole number of at least 1")
    if not finite(density) or not 0 < density <= 1:
        problems.append(f"density={density!r}: expected a share above 0 and up to 1")
    if problems:
        raise ValueError("blend: " + "; ".join(problems))
