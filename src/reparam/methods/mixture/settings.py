"""The settings of a mixture: its fields, and what is wrong between them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import ClassVar, Self

from reparam.core.base import Site
from reparam.core.checks import nearest, whole, wrong_words
from reparam.core.method import Method
from reparam.methods import patterns
from reparam.methods.lora import LoRA
from reparam.methods.mixture.select import GATES, SELECTS

KINDS = ("low_rank", "shared_a", "vectors")
ROUTERS = ("static", "task_embedding", "task_logits", "token", "sequence", "two_pass")
SCOPES = ("module", "layer", "block", "model")
LOSSES = ("switch_balance", "mole_balance", "loramoe_blc", "router_z", "contrastive")
_CHOICES = {
    "kind": KINDS,
    "router": ROUTERS,
    "scope": SCOPES,
    "route_on": ("input", "activation"),
    "select": SELECTS,
    "gate": GATES,
    "combine": ("delta", "factor"),
    "pool": ("prompt", "all"),
}


@dataclasses.dataclass(frozen=True)
class MixtureSettings(Method):
    """What a mixture is made of. Raises ValueError for values out of range and for what cannot go together."""

    takes_context: ClassVar[bool] = True

    n: int = 4
    """Number of experts."""
    r: int = 4
    """Rank of each expert."""
    alpha: float = 8.0
    """Numerator of the experts' scale."""
    scaling: str = "alpha_over_r"
    """How the scale follows from alpha and r, as in LoRA."""
    split: bool = False
    """Whether r is the rank of all experts together."""
    dropout: float = 0.0
    """Probability with which an element of the experts' input is zeroed in training."""
    init: str = "kaiming_uniform"
    """Distribution of A, as in LoRA."""
    init_std: float | None = None
    """Standard deviation of gaussian, as in LoRA."""
    kind: str = "low_rank"
    """What an expert is: low_rank, shared_a (B of its own, one A for all), or vectors (a factor for each output)."""
    experts: tuple[str, ...] = ()
    """Folders of finished adapters, or of runs, that are the experts; in a saved mixture, what they were called."""
    ranks: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """Ranks of finished experts, by site. Found in their files; not to be set."""
    frozen: bool = False
    """Train the router alone."""
    router: str = "token"
    """What the weights depend on: static, task_embedding, task_logits, token, sequence or two_pass."""
    scope: str = "module"
    """Where weights are the same: module, layer, block or model."""
    route_on: str = "input"
    """What a router of tokens looks at: a module's input, or (with vectors) the activation that they rescale."""
    router_bias: bool = False
    """Whether a router of tokens has a bias."""
    router_std: float | None = None
    """Standard deviation of the router's start; by default as its kind is usually drawn."""
    tasks: tuple[str, ...] = ("task",)
    """Names of the tasks, for the routers that go by them."""
    task_width: int = 64
    """Width of task embeddings."""
    pool: str = "prompt"
    """What a router of sequences looks at: the prompt alone, or all, which leaks what comes later in a causal model."""
    select: str = "softmax"
    """How weights follow from logits: softmax, sigmoid (normalized), or top_k."""
    temperature: float = 1.0
    """Divisor of the logits."""
    k: int = 1
    """How many experts top_k selects."""
    gate: str = "prob"
    """Weights of the experts that top_k selects: prob, renorm, ste or one."""
    combine: str = "delta"
    """Mix the experts' outputs (delta), or their A and B apart (factor)."""
    plain: str = ""
    """Regular expression for the ends of paths that get plain LoRA of rank r in the place of a mixture."""
    losses: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Auxiliary losses and their factors: switch_balance, mole_balance, loramoe_blc, router_z, contrastive."""
    blc_alpha: float = 0.0
    """Of loramoe_blc: how much more the experts of a row's type (its task, 0 or 1) are to be used."""
    contrastive_temperature: float = 0.1
    """Divisor of the cosines in the contrastive loss."""
    contrastive_warmup: float = 0.1
    """Share of the optimizer's steps that the contrastive loss is off for, where their number is known."""
    contrastive_pairs: int = 256
    """Most pairs of a token and an expert that the contrastive loss compares, at a site."""
    seed: int = 0
    """Seed of experts and routers. A site's numbers depend on the seed and its name, not on the order of wrapping."""

    def __post_init__(self) -> None:
        problems = wrong_words(self, _CHOICES)
        problems += [
            f"{field}={value!r}: expected a whole number of at least {least}"
            for field, least in (("n", 1), ("r", 1), ("k", 1), ("task_width", 1), ("contrastive_pairs", 2))
            if not whole(value := getattr(self, field), least)
        ]
        problems += [
            f"{field}={value!r}: expected a finite number above 0"
            for field in ("temperature", "contrastive_temperature")
            if not 0 < (value := getattr(self, field)) < math.inf
        ]
        problems += [
            f"losses: unknown {name!r}{nearest(name, LOSSES)}; there are {', '.join(LOSSES)}"
            for name in self.losses
            if name not in LOSSES
        ]
        problems += [
            f"losses: {name} has the factor {value!r}; expected a finite number of at least 0"
            for name, value in self.losses.items()
            if not 0 <= value < math.inf
        ]
        problems += patterns.broken("plain", [self.plain])
        if not problems:
            problems = self._clashes()
            self.lora(self.r)
        if problems:
            raise ValueError(f"{self.name}: " + "; ".join(problems))

    def _clashes(self) -> list[str]:
        """What is wrong between settings that are right alone."""
        looks = self.router in ("token", "sequence")
        found = [
            (self.select == "top_k" and self.k > self.n, f"k={self.k} of n={self.n} experts"),
            (
                self.select == "top_k" and self.k == 1 and self.gate == "renorm" and self.n > 1,
                "gate='renorm' with k=1 is the constant 1, and the router would learn nothing; use prob or ste",
            ),
            (self.select != "top_k" and (self.k, self.gate) != (1, "prob"), "k and gate are for select='top_k'"),
            (self.split and self.r % self.n > 0, f"r={self.r} cannot be split among n={self.n} experts"),
            (not self.tasks or len(set(self.tasks)) < len(self.tasks), "tasks: expected names, each of them once"),
            (
                len(self.tasks) > 1 and not self.goes_by_tasks,
                f"tasks are given, and router={self.router!r} does not go by them",
            ),
            (
                self.route_on == "activation" and (self.kind != "vectors" or self.scope != "module" or not looks),
                "route_on='activation' is for vectors whose router looks at the tokens of its own module",
            ),
            (
                self.router == "two_pass" and (self.scope != "model" or bool(self.plain)),
                "router='two_pass' has the scope model, and no plain sites: its first pass is the base alone",
            ),
            (self.combine == "factor" and self.kind != "low_rank", f"combine='factor' has no meaning for {self.kind}"),
            (self.frozen and self.kind != "low_rank", "frozen experts are low-rank adapters from folders"),
            (bool(self.experts) and not self.frozen, "experts from folders stay frozen: set frozen=true"),
            (len(set(self.experts)) < len(self.experts), "experts: one folder is named twice"),
            (
                self.kind == "vectors" and self.router_std == 0 and self.n > 1,
                "router_std=0 gives vectors that start alike the same gradients for ever; draw the router",
            ),
            (self.router_std is not None and not 0 <= self.router_std < math.inf, f"router_std={self.router_std!r}"),
            (
                self.losses.get("contrastive", 0) > 0 and (self.n < 2 or self.kind != "low_rank" or self.frozen),
                "the contrastive loss is for two or more low-rank experts that train",
            ),
            (
                self.select == "sigmoid" and self.scope != "module" and not looks,
                "select='sigmoid' draws at random in training, at each module anew: leave the scope at module",
            ),
            (
                not 0 <= self.contrastive_warmup < 1,
                f"contrastive_warmup={self.contrastive_warmup!r}: expected a share from 0 to below 1",
            ),
            (abs(self.blc_alpha) >= 1, f"blc_alpha={self.blc_alpha!r}: expected a number between -1 and 1"),
        ]
        return [problem for wrong, problem in found if wrong]

    @property
    def goes_by_tasks(self) -> bool:
        """Whether forwards have to say tasks, where there are several."""
        return self.router.startswith("task") or self.blc_alpha != 0

    @property
    def known_tasks(self) -> tuple[str, ...] | None:
        """Its `tasks`, where it goes by them."""
        return self.tasks if self.goes_by_tasks else None

    def with_tasks(self, names: tuple[str, ...]) -> Self:
        """With these `tasks`."""
        return dataclasses.replace(self, tasks=names)

    @property
    def low_rank_tasks(self) -> tuple[str, ...] | None:
        """Its `tasks`, unless its experts are vectors."""
        return None if self.kind == "vectors" else self.tasks

    @property
    def expert_folders(self) -> tuple[str, ...]:
        """Its `experts`, while their ranks are not known."""
        return () if self.ranks else self.experts

    def with_experts(self, names: tuple[str, ...], ranks: Mapping[str, tuple[int, ...]]) -> Self:
        """With these `experts` and their `ranks`."""
        return dataclasses.replace(self, n=len(names), experts=names, ranks=ranks)

    @property
    def each(self) -> int:
        """The rank of one expert."""
        return self.r // self.n if self.split else self.r

    def lora(self, rank: int) -> LoRA:
        """Experts of this rank, as a LoRA."""
        return LoRA(
            r=rank,
            alpha=self.alpha,
            scaling=self.scaling,
            dropout=self.dropout,
            init=self.init,
            init_std=self.init_std,
            seed=self.seed,
        )

    def is_plain(self, site: Site) -> bool:
        """Whether this site gets plain LoRA."""
        return bool(self.plain) and patterns.matches(self.plain, site.name)

    def place(self, site: Site) -> str:
        """The path that names this site's scope: its own, its parent's, its block's, or "" for the model."""
        if self.scope == "module":
            return site.name
        block = re.match(r"(?:.*?\.)?\d+(?=\.|$)", site.name) if self.scope == "block" else None
        return block[0] if block else "" if self.scope == "model" else site.name.rpartition(".")[0]
