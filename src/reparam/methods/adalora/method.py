"""AdaLoRA: distributes a rank budget among the sites during training (Zhang et al. 2023, arXiv 2303.10512).

    W' = W₀ + s P Λ Q        Q [R, I] and P [O, R] from N(0, 0.02²), Λ = diag(λ) zero: training starts at the base

A component is a column of P, a λ and a row of Q. The budget is the number of components of all sites together. During
training it falls from an average of `init_r` per site to `target_r`, and the components of the lowest importance are
masked, then removed. Sites therefore end with different ranks, possibly zero. `budget.py` has the schedule and the
importance. The optimizer that the adapter is bound to drives the budget, so that it works in any training loop.

Parameters and files call Q `A`, P `B` and λ `E`, as the released code and PEFT do. The scale s = α / (init_r + 1e-5) is
also that of the released code; it stays the same when ranks shrink.

Shapes: O out_features, I in_features, R rank, N rows of a flattened batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from torch import nn

from reparam.core.base import Site, Update, Weight
from reparam.core.checks import finite, whole, wrong_words
from reparam.core.method import Method
from reparam.core.registry import method
from reparam.methods import patterns
from reparam.methods.adalora.budget import Budget, Rules, Schedule
from reparam.methods.adalora.update import SVDUpdate, components
from reparam.methods.dora import DoRA
from reparam.methods.lora import seeded

ORTH_FORMS = ("reference", "paper")
SCORES = ("after", "before")
_STD = 0.02


@method("adalora")
@dataclasses.dataclass(frozen=True)
class AdaLoRA(Method):
    """AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): LoRA whose ranks are distributed among the sites during training.

    Raises ValueError for target_r above init_r and for numbers out of range; and, once the number of steps is known,
    for a schedule that does not fit into it.

    >>> AdaLoRA(init_r=8, target_r=12)
    Traceback (most recent call last):
    ValueError: AdaLoRA: target_r=12 is above init_r=8: the budget can only fall
    >>> import torch, reparam
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> adapter = reparam.attach(model, reparam.AdaLoRA(init_r=3, target_r=2), targets=["0"])
    >>> {name: tuple(p.shape) for name, p, _ in adapter.named_parameters()}
    {'0.A': (3, 8), '0.B': (6, 3), '0.E': (3,)}
    """

    has_components: ClassVar[bool] = True
    ties: ClassVar[bool] = True
    drops_empty_sites: ClassVar[bool] = False
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"init_r": 4, "target_r": 2, "alpha": 64, "total_steps": 4, "tinit": 0, "tfinal": 2},
        {"init_r": 3, "target_r": 3, "alpha": 120, "total_steps": 3, "dropout": 0.1, "orth_form": "paper"},
        {"init_r": 2, "target_r": 0.5, "alpha": 32, "total_steps": 100, "score": "before", "magnitude": True},
    )

    init_r: int = 12
    """Rank of every site at the start."""
    target_r: float = 8
    """Mean rank of the sites at the end. The final budget is this times the number of sites, rounded."""
    alpha: float = 16.0
    """Numerator of the scale alpha / (init_r + 1e-5)."""
    dropout: float = 0.0
    """Dropout probability on the input of the low-rank branch, in training. Embeddings have no dropout."""
    total_steps: int | None = None
    """Number of optimizer steps of the run. `reparam train` sets it; in your own loop, pass it here or to `bind`."""
    tinit: int | None = None
    """Steps before the budget begins to fall; by default a sixth of the run."""
    tfinal: int | None = None
    """Steps at the end with the final ranks; by default half of the run."""
    delta_t: int = 1
    """Number of steps between two selections of the components that stay active."""
    milestones: tuple[int, ...] = ()
    """Steps, before the final ranks, after which the masked components are also removed for good."""
    beta1: float = 0.85
    """Decay of the moving average of the sensitivities, between 0 and 1."""
    beta2: float = 0.85
    """Decay of the moving average of their deviations, between 0 and 1."""
    score: str = "after"
    """Measure importance after the optimizer step, as the released code does, or before it, as in the paper."""
    orth_weight: float = 0.1
    """Weight of the penalty that keeps P and Q orthogonal; 0 turns it off. The paper uses 0.1 to 0.5, PEFT 0.5."""
    orth_form: str = "reference"
    """Orthogonality penalty: mean Frobenius norm (reference: released code, PEFT) or sum of squared norms (paper)."""
    magnitude: bool = False
    """Also train DoRA's magnitudes."""
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Ranks of single sites: a regular expression for the end of the path -> rank. Saved files have the final ranks."""
    seed: int = 0
    """Seed for P and Q. The values depend on the seed and the site's name, not on the order of wrapping."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = [
            f"{key}={value!r}: expected a whole number of at least {least}"
            for key, value, least in (
                ("init_r", self.init_r, 1),
                ("delta_t", self.delta_t, 1),
                ("total_steps", self.total_steps, 1),
                ("tinit", self.tinit, 0),
                ("tfinal", self.tfinal, 0),
                *((f"rank_pattern[{name!r}]", rank, 0) for name, rank in self.rank_pattern.items()),
                *((f"milestones[{i}]", step, 1) for i, step in enumerate(self.milestones)),
            )
            if not (value is None and key in ("total_steps", "tinit", "tfinal")) and not whole(value, least)
        ]
        problems += [
            f"{key}={value!r}: expected a finite number {'above' if key == 'alpha' else 'of at least'} 0"
            for key, value in (("alpha", self.alpha), ("target_r", self.target_r), ("orth_weight", self.orth_weight))
            if not finite(value) or value < 0 or (key == "alpha" and value == 0)
        ]
        if not problems and self.target_r > self.init_r:
            problems.append(f"target_r={self.target_r!r} is above init_r={self.init_r!r}: the budget can only fall")
        problems += [
            f"{key}={value!r}: expected a number between 0 and 1"
            for key, value in (("beta1", self.beta1), ("beta2", self.beta2))
            if not finite(value) or not 0 < value < 1
        ]
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout={self.dropout!r}: expected a probability in [0, 1)")
        problems += wrong_words(self, {"score": SCORES, "orth_form": ORTH_FORMS})
        problems += patterns.broken("rank_pattern", self.rank_pattern)
        if problems:
            raise ValueError("AdaLoRA: " + "; ".join(problems))
        object.__setattr__(self, "milestones", tuple(self.milestones))
        if self.total_steps is not None:
            self.plan(self.total_steps)

    @property
    def rules(self) -> Rules:
        """The settings of the budget."""
        return Rules(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Rules)})

    def plan(self, total_steps: int) -> Schedule:
        """The schedule of a run of `total_steps` optimizer steps. Raises ValueError if it does not fit."""
        return self.rules.plan(total_steps)

    def rank(self, name: str) -> int:
        """The initial rank of the site with this path."""
        return patterns.first(self.rank_pattern, name, self.init_r)

    @property
    def magnitude_axis(self) -> Literal["output"] | None:
        """The axis "output" if magnitudes train, else None."""
        return "output" if self.magnitude else None

    def check(self, sites: list[Site]) -> None:
        """Raise ValueError for a pattern that matches no site."""
        patterns.check_used("rank_pattern", self.rank_pattern, [site.name for site in sites], method="AdaLoRA")

    def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> Update:
        """A new update: P and Q are drawn from the seed and the site's name, λ is zero."""
        generator = seeded(self.seed, site)
        r = self.rank(site.name)
        a = torch.empty(r, site.in_features).normal_(0, _STD, generator=generator)
        b = torch.empty(site.out_features, r).normal_(0, _STD, generator=generator)
        update = SVDUpdate(
            a.to(weight.device), b.to(weight.device), scale=self.alpha / (self.init_r + 1e-5), dropout=self.dropout
        )
        return DoRA().over(update, site, weight) if self.magnitude else update

    def controller(self, updates: Mapping[str, Update]) -> Budget:
        """The budget of these updates, which acts around the steps of the bound optimizer."""
        return Budget(self.rules, {name: components(update) for name, update in updates.items()})

    def with_ranks_of(self, updates: Mapping[str, Update]) -> Self:
        """The configuration with the current ranks of these updates."""
        return self.with_ranks({name: len(components(update).E) for name, update in updates.items()})

    def with_ranks(self, ranks: Mapping[str, int]) -> Self:
        """The configuration with these ranks: itself if they are its ranks, else with a pattern for each site."""
        if all(self.rank(name) == rank for name, rank in ranks.items()):
            return self
        return dataclasses.replace(self, rank_pattern=patterns.exactly(ranks))

    def renamed(self, names: Mapping[str, str]) -> Self:
        """The configuration with the same ranks at sites with other paths (old -> new)."""
        ranks = {new: self.rank(old) for old, new in names.items()}
        kept = {new: rank for new, rank in ranks.items() if rank != self.init_r}
        return dataclasses.replace(self, rank_pattern=patterns.exactly(kept))
