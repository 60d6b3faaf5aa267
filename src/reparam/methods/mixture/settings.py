"""The settings of a mixture, and the checks for conflicts between them."""

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
    """The settings of a mixture. Raises ValueError for values out of range and for settings that conflict."""

    takes_context: ClassVar[bool] = True

    n: int = 4
    """Number of experts."""
    r: int = 4
    """Rank of each expert."""
    alpha: float = 8.0
    """Numerator of the experts' scale: by default their output is multiplied by alpha / r."""
    scaling: str = "alpha_over_r"
    """Scale of the experts, as in LoRA: alpha_over_r, alpha, rslora or none."""
    split: bool = False
    """Treat r as the total rank of all experts: each has rank r / n."""
    dropout: float = 0.0
    """Dropout probability on the experts' input, in training."""
    init: str = "kaiming_uniform"
    """Distribution of A, as in LoRA: kaiming_uniform or gaussian."""
    init_std: float | None = None
    """Standard deviation for init=gaussian, as in LoRA."""
    kind: str = "low_rank"
    """Kind of experts: low_rank, shared_a (one A for all, a B for each), or vectors (a factor for each output)."""
    experts: tuple[str, ...] = ()
    """Folders of trained adapters or runs to use as experts. A saved mixture has their names here."""
    ranks: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """Ranks of the trained experts, by site. Read from their files; do not set it."""
    frozen: bool = False
    """Train only the router."""
    router: str = "token"
    """Router, by its input: static (none), task_embedding or task_logits (the task), token, sequence or two_pass."""
    scope: str = "module"
    """Sites that share weights: those of one module, layer (one parent module), block (repeated layer) or model."""
    route_on: str = "input"
    """Input of a token or sequence router: the module's input, or (with vectors) the activation that they rescale."""
    router_bias: bool = False
    """Give a token or two_pass router a bias."""
    router_std: float | None = None
    """Standard deviation of the router's initial parameters; by default the usual initialization of its kind."""
    tasks: tuple[str, ...] = ("task",)
    """Names of the tasks, for routers that depend on the task."""
    task_width: int = 64
    """Width of task embeddings."""
    pool: str = "prompt"
    """Tokens that a sequence router reads: prompt, or all, which leaks later tokens in a causal model."""
    select: str = "softmax"
    """How weights are computed from logits: softmax, sigmoid (normalized), or top_k."""
    temperature: float = 1.0
    """Divisor of the logits, above 0."""
    k: int = 1
    """Number of experts that top_k selects."""
    gate: str = "prob"
    """Weights of the experts that top_k selects: prob, renorm (sum to 1), ste (1, with a gradient) or one (1)."""
    combine: str = "delta"
    """Mix the experts' outputs (delta), or their A and B separately (factor)."""
    plain: str = ""
    """Regular expression for the ends of the paths that get plain LoRA of rank r instead of a mixture."""
    losses: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Auxiliary losses and their factors: switch_balance, mole_balance, loramoe_blc, router_z, contrastive."""
    blc_alpha: float = 0.0
    """For loramoe_blc: how much more to use the experts of a row's type (its task, 0 or 1), from -1 to 1."""
    contrastive_temperature: float = 0.1
    """Divisor of the cosine similarities in the contrastive loss, above 0."""
    contrastive_warmup: float = 0.1
    """Share of the optimizer steps, from 0 to below 1, before the contrastive loss is on, if their number is known."""
    contrastive_pairs: int = 256
    """Maximum number of (token, expert) pairs that the contrastive loss compares at a site."""
    seed: int = 0
    """Seed for experts and routers. Values depend on the seed and the site's name, not on the order of wrapping."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
        """A message for each conflict between settings that are valid on their own."""
        looks = self.router in ("token", "sequence")
        found = [
            (self.select == "top_k" and self.k > self.n, f"k={self.k} is above n={self.n}, the number of experts"),
            (
                self.select == "top_k" and self.k == 1 and self.gate == "renorm" and self.n > 1,
                "gate='renorm' with k=1 is the constant 1, so the router would not train; use prob or ste",
            ),
            (self.select != "top_k" and (self.k, self.gate) != (1, "prob"), "k and gate need select='top_k'"),
            (self.split and self.r % self.n > 0, f"r={self.r} cannot be split among n={self.n} experts"),
            (not self.tasks or len(set(self.tasks)) < len(self.tasks), "tasks: expected one or more different names"),
            (
                len(self.tasks) > 1 and not self.goes_by_tasks,
                f"tasks are set, but router={self.router!r} does not depend on them",
            ),
            (
                self.route_on == "activation" and (self.kind != "vectors" or self.scope != "module" or not looks),
                "route_on='activation' needs kind='vectors', scope='module' and router='token' or 'sequence'",
            ),
            (
                self.router == "two_pass" and (self.scope != "model" or bool(self.plain)),
                "router='two_pass' needs scope='model' and no plain sites, because its first pass runs the base alone",
            ),
            (
                self.combine == "factor" and self.kind != "low_rank",
                f"combine='factor' does not support kind={self.kind!r}",
            ),
            (self.frozen and self.kind != "low_rank", "frozen=true needs kind='low_rank'"),
            (bool(self.experts) and not self.frozen, "experts from folders do not train: set frozen=true"),
            (len(set(self.experts)) < len(self.experts), "experts: one folder is named twice"),
            (
                self.kind == "vectors" and self.router_std == 0 and self.n > 1,
                "router_std=0 keeps all vectors equal, because their gradients are equal; set it above 0",
            ),
            (
                self.router_std is not None and not 0 <= self.router_std < math.inf,
                f"router_std={self.router_std!r}: expected a finite number of at least 0",
            ),
            (
                self.losses.get("contrastive", 0) > 0 and (self.n < 2 or self.kind != "low_rank" or self.frozen),
                "the contrastive loss needs two or more low-rank experts that train",
            ),
            (
                self.select == "sigmoid" and self.scope != "module" and not looks,
                f"select='sigmoid' with router={self.router!r} samples at each module in training: set scope='module'",
            ),
            (
                not 0 <= self.contrastive_warmup < 1,
                f"contrastive_warmup={self.contrastive_warmup!r}: expected a share from 0 to below 1",
            ),
            (not abs(self.blc_alpha) < 1, f"blc_alpha={self.blc_alpha!r}: expected a number between -1 and 1"),
        ]
        return [problem for wrong, problem in found if wrong]

    @property
    def goes_by_tasks(self) -> bool:
        """Whether each forward pass needs its tasks, if there are several."""
        return self.router.startswith("task") or self.blc_alpha != 0

    @property
    def known_tasks(self) -> tuple[str, ...] | None:
        """`tasks` if the mixture depends on the task, else None."""
        return self.tasks if self.goes_by_tasks else None

    def with_tasks(self, names: tuple[str, ...]) -> Self:
        """The configuration with these `tasks`."""
        return dataclasses.replace(self, tasks=names)

    @property
    def low_rank_tasks(self) -> tuple[str, ...] | None:
        """`tasks`; None if the experts are vectors."""
        return None if self.kind == "vectors" else self.tasks

    @property
    def expert_folders(self) -> tuple[str, ...]:
        """The folders in `experts`, if they have not been read yet."""
        return () if self.ranks else self.experts

    def with_experts(self, names: tuple[str, ...], ranks: Mapping[str, tuple[int, ...]]) -> Self:
        """The configuration with the experts that were read: their names and, by site, their ranks."""
        return dataclasses.replace(self, n=len(names), experts=names, ranks=ranks)

    @property
    def each(self) -> int:
        """The rank of one expert."""
        return self.r // self.n if self.split else self.r

    def lora(self, rank: int) -> LoRA:
        """The LoRA configuration of experts with this rank."""
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
        """Whether this site gets plain LoRA instead of a mixture."""
        return bool(self.plain) and patterns.matches(self.plain, site.name)

    def place(self, site: Site) -> str:
        """The name of the site's scope: the path of the module, its parent or its block, or "" for the model."""
        if self.scope == "module":
            return site.name
        block = re.match(r"(?:.*?\.)?\d+(?=\.|$)", site.name) if self.scope == "block" else None
        return block[0] if block else "" if self.scope == "model" else site.name.rpartition(".")[0]
