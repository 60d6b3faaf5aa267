"""What an adapter does to each linear map, as a low-rank change: exactly where that is possible, else with its error.

    ΔW = (gain - 1) W + B A        of the best rank k:  error = |ΔW - ΔW_k| / |ΔW|   (Frobenius norms)

Programs that serve plain LoRA take factors and nothing else. A LoRA, an AdaLoRA and one task of a mixture are such
factors. DoRA's gain, and a change of full rank, are not: what rank they need is computed here, never guessed.

Shapes: O out_features, I in_features, K = min(O, I).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from reparam.adapter.adapter import Adapter
from reparam.combine.lowrank import numeric_rank, singular
from reparam.core.base import Factors, Site, Weight
from reparam.core.checks import listed
from reparam.core.progress import tracked
from reparam.errors import ExportError

LARGEST_ERROR = 0.01


@dataclasses.dataclass(frozen=True)
class Change:
    """The change of one linear map."""

    site: Site
    factors: Factors
    """A [R, I] and B [O, R] in float64, without a gain: the whole change, or its best approximation of rank R."""
    values: Tensor
    """All singular values of the change [K] in float64, descending."""

    @property
    def rank(self) -> int:
        """Rank at which nothing of the change is lost, up to rounding."""
        return min(len(self.factors.A), numeric_rank(self.values))

    def error(self, rank: int) -> float:
        """Share of |ΔW| that the best approximation of this rank misses."""
        return float(self.values[rank:].norm() / self.values.norm()) if rank < self.rank else 0.0

    def at(self, rank: int) -> Factors:
        """The best approximation of this rank, with rows and columns of zeros if the change has a lower one."""
        A, B = self.factors.A, self.factors.B
        if len(A) > rank:
            u, s, vh = singular(self.factors)
            root = s[:rank].sqrt()
            A, B = root[:, None] * vh[:rank], u[:, :rank] * root
        return filled(A, B, rank)


@torch.no_grad()
def changes_of(adapter: Adapter, program: str, *, most: int | None = None, experts: bool = False) -> dict[str, Change]:
    """The change of each adapted linear map, by path; maps that the adapter leaves as they are have none.

    Args:
        adapter: an adapter on its model, with the task set if its gates depend on one.
        program: the program that will read the result, for messages.
        most: highest rank that the program takes; higher components are dropped here, to save memory.
        experts: whether the program takes changes of experts.

    Raises ExportError if the adapter also changes what is no matrix of a linear map, or changes nothing; and
    InputDependentError if its change depends on the input.
    """
    check_linear(adapter, program, experts=experts)
    found = {}
    for path, update in tracked(adapter.updates.items(), "computing changes", unit="modules"):
        frozen = adapter.modules[path].frozen
        factors = Factors(*(None if t is None else t.detach().double() for t in update.factors(frozen)))  # type: ignore[arg-type]
        change = _change(adapter.sites[path], factors, frozen, most)
        if len(change.values) and change.values[0] > 0:
            found[path] = change
            for tied, site in adapter.tied.items():
                if site == path:
                    found[tied] = dataclasses.replace(change, site=dataclasses.replace(change.site, name=tied))
    if not found:
        raise ExportError("the adapter changes nothing: all its changes are zero; train it first")
    return found


def check_linear(adapter: Adapter, program: str, *, experts: bool = False) -> None:
    """Raise ExportError if the adapter changes anything but the matrices of linear maps, and, if so, of experts."""
    kinds = ("linear", "expert") if experts else ("linear",)
    sites = [path for path, module in adapter.modules.items() if module.kind not in kinds]
    biases = [
        f"{path}.bias"
        for path, module in adapter.modules.items()
        if adapter.name in module.biases or module.updates[adapter.name].bias_delta() is not None  # type: ignore[operator]
    ]
    for what, names in (("modules", sites), ("biases", biases), ("whole modules", list(adapter.replaced))):
        if names:
            raise ExportError(
                f"{program} takes changes of linear maps only, and this adapter also trains {what}: {listed(names)}; "
                f"pass --merged to write a merged model instead"
            )


def filled(A: Tensor, B: Tensor, rank: int) -> Factors:
    """The factors A [R, I] and B [O, R] with rows and columns of zeros up to this rank."""
    missing = rank - len(A)
    return Factors(torch.cat([A, A.new_zeros(missing, A.shape[1])]), torch.cat([B, B.new_zeros(len(B), missing)], 1))


def rank_for(
    changes: Mapping[str, Change], ranks: Sequence[int] | None, rank: int | None, most_error: float, program: str
) -> int:
    """The rank to write: `rank`, or the smallest at which no map misses more than `most_error` of its change.

    `ranks` are those that the program takes, ascending; None for all. Raises ExportError if there is no such rank, or
    if `rank` is not one that the program takes or misses more.
    """
    needed = max(change.rank for change in changes.values())
    allowed = list(ranks) if ranks is not None else list(range(1, max(needed, rank or 1) + 1))
    if rank is not None and rank not in allowed:
        raise ExportError(f"--rank {rank}: {program} takes only the ranks {', '.join(map(str, allowed))}")
    tried = [rank] if rank is not None else allowed
    for one in tried:
        if worst_error(changes, one)[1] <= most_error:
            return one
    told = [r for r in (allowed if ranks is not None else _powers(needed)) if r <= needed] or tried
    table = ", ".join(f"{r}: {100 * worst_error(changes, r)[1]:.2g} %" for r in dict.fromkeys([*told, *tried]))
    raise ExportError(
        f"as a plain LoRA this adapter would lose more than {100 * most_error:g} % of its change (by rank, at the "
        f"worst module: {table}); pass --merged to write a merged model, which is exact, or allow more with --max-error"
    )


def worst_error(changes: Mapping[str, Change], rank: int) -> tuple[str, float]:
    """The module whose change this rank misses most of, and the share that it misses."""
    errors = {path: change.error(rank) for path, change in changes.items()}
    path = max(errors, key=errors.__getitem__)
    return path, errors[path]


def _powers(needed: int) -> list[int]:
    return [2**n for n in range(int(math.log2(max(1, needed))) + 1)]


def _change(site: Site, factors: Factors, frozen: Weight, most: int | None) -> Change:
    """The change as factors without a gain."""
    K = min(site.out_features, site.in_features)
    if factors.gain is None and len(factors.A) <= K:
        return Change(site, factors, singular(factors)[1])
    u, s, vh = torch.linalg.svd(factors.change(frozen.dense().double()), full_matrices=False)
    kept = min(numeric_rank(s), most or K)
    return Change(site, Factors(s[:kept, None] * vh[:kept], u[:, :kept]), s)
