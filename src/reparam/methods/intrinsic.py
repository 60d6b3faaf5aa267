"""Intrinsic dimension: trains a whole model through d numbers (Li et al. 2018; Aghajanyan et al. 2020, 2012.13255).

    did     ΔW_i = P_i θ                θ in R^d, zero at first
    said    ΔW_i = λ_g(i) · P_i θ       θ in R^(d − m), and m numbers λ, 1 at first, one for each group of tensors

P_i is a fixed random map, drawn from the seed and the site's name at every use (`projections.py`). An adapter is
therefore a seed and d numbers, which are parameters of the model's root. λ gets no gradient while θ is zero.

With `space="weight"`, ΔW_i is the whole matrix. It exists only while its site is computed: the forward pass saves x and
θ, and the backward pass draws P_i again. If W is dense and has at least 32 bits, ΔW_i is added to W before the product
with x; otherwise ΔW_i x is computed separately, so that rounding W + ΔW_i does not erase it. With `space="factor"`, for
large models, P_i θ changes two factors of rank r, which start where LoRA starts:

    ΔW_i = B A,    (A, B) = (A_0, 0) + λ · P_i θ        A_0 as LoRA draws it

With θ = 0 both give the base model's output, bit for bit. Norm weights and biases are changed directly in both spaces,
through maps of their own. The target "everything" covers the whole model, as in the paper, except tied weights.
Token-by-token generation draws every P_i again for each token; merge the adapter first.

The released code uses m + 1 of the d numbers for λ, one of which has no effect; `kernels.fastfood` names the other
differences.

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
    """Intrinsic dimension (Aghajanyan et al. 2020, arXiv 2012.13255): d numbers change all weights through random maps.

    Raises ValueError for values out of range and for a version of the maps other than this release's. `attach` raises
    it if the groups of mode "said" use up all d numbers, and warns if d exceeds the number of entries that change.

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
    """Number of trained parameters, including λ."""
    mode: str = "did"
    """did trains θ only; said trains θ and a factor λ for each group of tensors."""
    said_groups: str = "tensor"
    """One λ for each tensor, for each module (weight and bias together), or for each block (a repeated layer)."""
    projection: str = "fastfood"
    """The random map: fastfood, dense or sparse; dense is for small models."""
    layout: str = "stacked"
    """Layout of fastfood: stacked (several blocks) or padded (one block for each tensor, as in the released code)."""
    space: str = "weight"
    """What the d numbers change: the weight matrix itself (weight), or two factors of rank r (factor)."""
    r: int = 8
    """Rank of the two factors with space=factor."""
    bias: bool = True
    """Change the biases of the sites too."""
    biased: tuple[str, ...] = ()
    """Sites whose biases change. Written on save, so that the file can be read without the model; do not set it."""
    seed: int = 0
    """Seed of the maps. A map depends on the seed and the site's name, not on the order in which sites are wrapped."""
    projection_version: int = VERSION
    """Version of the random maps. Files with another version are refused; do not set it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = wrong_words(self, _CHOICES)
        problems += [
            f"{field}={value!r}: expected a whole number of at least 1"
            for field in ("d", "r")
            if not whole(value := getattr(self, field), 1)
        ]
        if self.layout != "stacked" and self.projection != "fastfood":
            problems.append(f"layout={self.layout!r} needs projection='fastfood'")
        if self.projection_version != VERSION:
            problems.append(
                f"projection_version={self.projection_version!r}: this release draws version {VERSION} of the random "
                f"maps, and numbers trained with another do not fit them; use the release that saved the adapter"
            )
        if problems:
            raise ValueError("intrinsic: " + "; ".join(problems))

    @property
    def default_targets(self) -> tuple[str, ...]:
        """The whole model, or its linear layers with space="factor"."""
        return ("everything",) if self.space == "weight" else ("all-linear",)

    def group(self, name: str) -> str:
        """The group of the tensor with this path (such as "layers.0.q_proj.weight"): a tensor, module or block path."""
        if self.said_groups == "tensor":
            return name
        if self.said_groups == "module":
            return name.rpartition(".")[0]
        block = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
        return block[0] if block else ""

    def sizes(self, site: Site) -> dict[str, int]:
        """Number of entries that change, by tensor path: of the weight (or its factors) and the bias, if it changes."""
        rows, columns = site.out_features, site.in_features
        weight = self.r * (rows + columns) if self._factors(site) else rows * columns
        found = {f"{site.name}.weight": weight}
        moves = self.bias and (site.bias or site.name in self.biased)
        return {**found, f"{site.name}.bias": rows} if moves else found

    def subspace(self) -> Self:
        """Itself: d can be any positive number."""
        return self

    def with_dimensions(self, d: int, draw: int = 0) -> Self:
        """The configuration with this d; `draw` is added to the seed, which gives other random maps."""
        return dataclasses.replace(self, d=d, seed=self.seed + draw)

    def moved(self, site: Site) -> int:
        """Number of entries that change at a site, in all its tensors."""
        return sum(self.sizes(site).values())

    def with_ranks_of(self, updates: Mapping[str, Update]) -> Self:
        """The configuration with `biased` set to the sites whose biases change."""
        biased = tuple(name for name, update in updates.items() if update.bias_delta() is not None)
        return dataclasses.replace(self, biased=biased)

    def _factors(self, site: Site) -> bool:
        return self.space == "factor" and site.kind != "vector"

    def _groups(self, sites: list[Site]) -> list[str]:
        """Names of the λ groups of these sites, in order; none with mode "did"."""
        tensors = (name for site in sites for name in self.sizes(site))
        return list(dict.fromkeys(map(self.group, tensors))) if self.mode == "said" else []

    def check(self, sites: list[Site]) -> None:
        """Raise ValueError if λ uses up all d numbers."""
        groups = self._groups(sites)
        if self.d <= len(groups):
            raise ValueError(
                f"intrinsic: mode='said' uses one number for each of {len(groups)} groups, and d={self.d} leaves none "
                f"for θ; raise d, or choose coarser said_groups"
            )

    def notes(self, sites: list[Site]) -> list[str]:
        """A warning if d exceeds the number of entries that change."""
        total = sum(map(self.moved, sites))
        if self.d <= total:
            return []
        return [f"intrinsic: d={self.d} is more than the {total} numbers that it changes; a larger d adds no freedom"]

    def shared(self, sites: list[Site]) -> Space:
        """The shared parameters: θ [d − m] and, with mode "said", λ [m]."""
        groups = self._groups(sites)
        return Space(self.d - len(groups), groups)

    def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> Update:
        """A new update; its maps are drawn from the seed and the site's name."""
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
