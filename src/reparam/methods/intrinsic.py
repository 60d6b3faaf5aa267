"""Intrinsic dimension: all of a model trained through d numbers (Li et al. 2018; Aghajanyan et al. 2020, 2012.13255).

    did     ΔW_i = P_i θ                θ in R^d, zero at first
    said    ΔW_i = λ_g(i) · P_i θ       θ in R^(d − m), and m numbers λ, 1 at first, one for each group of tensors

P_i is a fixed random map that is drawn from the seed and the site's name whenever it is used (`projections.py`), so
that an adapter is a seed and d numbers, which the model's root owns. λ gets no gradient until θ has moved.

In `space="weight"` ΔW_i is the whole matrix. It exists while its site is computed and not after: the forward keeps x
and θ, and the backward draws P_i again. Over a dense base of 32 bits or more it is added to W, and multiplied once;
otherwise it is multiplied by itself, so that it does not vanish in the rounding. In `space="factor"`, for large models,
P_i θ moves the two factors of a rank r from where LoRA starts:

    ΔW_i = B A,    (A, B) = (A_0, 0) + λ · P_i θ        A_0 as LoRA draws it

With θ = 0 either is the base, to the bit. Norms, which are vectors, move whole in both, and so do biases, by maps of
their own; with the target "everything" that is all of the model, as in the paper, but for what shares its weight.
Tokens that are generated one by one draw P_i for each; merge before.

The released code spends m + 1 of d numbers on λ, one of them unused; what else differs is in `kernels.fastfood`.

Shapes: O out_features, I in_features, m groups.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import nn

from reparam.core.base import Site, Update, Weight
from reparam.core.checks import whole, wrong_words
from reparam.core.method import Method
from reparam.core.registry import method
from reparam.kernels.fastfood_tables import VERSION
from reparam.methods.intrinsic_update import FactorUpdate, Move, Space, WeightUpdate
from reparam.methods.lora import LoRA
from reparam.methods.projections import KINDS, LAYOUTS, Projection, key_of

_CHOICES = {
    "mode": ("did", "said"),
    "said_groups": ("tensor", "module", "block"),
    "projection": KINDS,
    "layout": LAYOUTS,
    "space": ("weight", "factor"),
}


@method("intrinsic")
@dataclasses.dataclass(frozen=True)
class Intrinsic(Method):
    """Configuration of training in an intrinsic space.

    Raises ValueError for values out of range and for another version of the maps than this release's; once the sites
    are known, for a d that the groups' numbers use up. Warns of more numbers than the sites have.

    >>> Intrinsic(d=100, mode="said").mode
    'said'
    >>> import torch, reparam
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> adapter = reparam.attach(model, reparam.Intrinsic(d=5), targets=["0"])
    >>> sum(p.numel() for p in adapter.parameters())  # for any size of model
    5
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"d": 200, "bias": False},
        {"d": 70, "mode": "said", "bias": False},
        {"d": 50, "mode": "said", "said_groups": "block", "space": "factor", "r": 4, "bias": False},
    )

    d: int = 1000
    """How many numbers train, those of λ included."""
    mode: str = "did"
    """did: θ alone; said: θ, and a factor λ for each group of tensors."""
    said_groups: str = "tensor"
    """What has a λ of its own: tensor, module (its weight and its bias together), or block (of a repeated stack)."""
    projection: str = "fastfood"
    """The random map: fastfood, dense or sparse; dense is for small models."""
    layout: str = "stacked"
    """Of fastfood: stacked blocks, or padded, one block for a tensor, as in the released code."""
    space: str = "weight"
    """What moves: weight, the matrix itself, or factor, two factors of rank r."""
    r: int = 8
    """Rank in the space of factors."""
    bias: bool = True
    """Whether the biases of the sites move as well."""
    biased: tuple[str, ...] = ()
    """Sites whose biases move, for whoever reads a file without the model. Found when it is saved; not to be set."""
    seed: int = 0
    """Seed of the maps. A site's map depends on the seed and its name, not on the order of wrapping."""
    projection_version: int = VERSION
    """Of the random numbers behind the maps; files of another one are refused. Not to be set."""

    def __post_init__(self) -> None:
        problems = wrong_words(self, _CHOICES)
        problems += [
            f"{field}={value!r}: expected a whole number of at least 1"
            for field in ("d", "r")
            if not whole(value := getattr(self, field), 1)
        ]
        if self.layout != "stacked" and self.projection != "fastfood":
            problems.append(f"layout={self.layout!r} is for projection='fastfood'")
        if self.projection_version != VERSION:
            problems.append(
                f"projection_version={self.projection_version!r}: this release draws version {VERSION} of the random "
                f"maps, and numbers that were trained under another mean nothing here; use the release they come from"
            )
        if problems:
            raise ValueError("intrinsic: " + "; ".join(problems))

    @property
    def default_targets(self) -> tuple[str, ...]:
        """All of the model; in the space of factors, its linear maps."""
        return ("everything",) if self.space == "weight" else ("all-linear",)

    def group(self, name: str) -> str:
        """The group of the tensor with this path, "layers.0.q_proj.weight" say."""
        if self.said_groups == "tensor":
            return name
        if self.said_groups == "module":
            return name.rpartition(".")[0]
        block = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
        return block[0] if block else ""

    def sizes(self, site: Site) -> dict[str, int]:
        """How many numbers move at a site: of its weight and, maybe, its bias, by their paths."""
        rows, columns = site.out_features, site.in_features
        weight = self.r * (rows + columns) if self._factors(site) else rows * columns
        found = {f"{site.name}.weight": weight}
        moves = self.bias and (site.bias or site.name in self.biased)
        return {**found, f"{site.name}.bias": rows} if moves else found

    def subspace(self) -> Self:
        """Its d is free."""
        return self

    def with_dimensions(self, d: int, draw: int = 0) -> Self:
        """With this d. Another draw has another seed."""
        return dataclasses.replace(self, d=d, seed=self.seed + draw)

    def moved(self, site: Site) -> int:
        """The numbers of its weight and, maybe, its bias."""
        return sum(self.sizes(site).values())

    def with_ranks_of(self, updates: Mapping[str, Update]) -> Self:
        """The configuration with the names of the sites whose biases move."""
        biased = tuple(name for name, update in updates.items() if update.bias_delta() is not None)
        return dataclasses.replace(self, biased=biased)

    def _factors(self, site: Site) -> bool:
        return self.space == "factor" and site.kind != "vector"

    def _groups(self, sites: list[Site]) -> list[str]:
        """What has a λ of its own at these sites."""
        tensors = (name for site in sites for name in self.sizes(site))
        return list(dict.fromkeys(map(self.group, tensors))) if self.mode == "said" else []

    def check(self, sites: list[Site]) -> None:
        """Refuse a d that λ uses up."""
        groups = self._groups(sites)
        if self.d <= len(groups):
            raise ValueError(
                f"intrinsic: mode='said' spends a number on each of {len(groups)} groups, and d={self.d} leaves none "
                f"for the rest; raise d, or choose wider said_groups"
            )

    def notes(self, sites: list[Site]) -> list[str]:
        """Where d is above the number of weights."""
        total = sum(map(self.moved, sites))
        if self.d <= total:
            return []
        return [f"intrinsic: d={self.d} is more than the {total} numbers that it moves, and reaches nothing more"]

    def shared(self, sites: list[Site]) -> Space:
        """θ, and λ of each group."""
        groups = self._groups(sites)
        return Space(self.d - len(groups), groups)

    def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> Update:
        """A fresh update; its maps are drawn from the seed and the site's name."""
        space = self.shared([site]) if shared is None else shared
        assert isinstance(space, Space)
        moves = [
            Move(
                Projection(self.projection, key_of(self.seed, name), len(space.theta), size, self.layout),
                space.groups.index(self.group(name)) if space.groups else None,
            )
            for name, size in self.sizes(site).items()
        ]
        if not self._factors(site):
            return WeightUpdate(space, *moves)
        return FactorUpdate(space, *moves, start=LoRA(r=self.r, seed=self.seed).build(site, weight, None).A.detach())
