"""Mixtures of experts at the sites of an adapter, as one method: experts, a router, what is selected, how it combines.

    y = W x + s · COMBINE_i(g_i, B_i A_i) x        g = SELECT(ROUTER(what it may look at)),  N experts

The systems of the literature are settings of it (`presets.py`). A router has a scope: the module, the layer (modules
of one parent), the block (of a repeated stack) or the model; where it looks at activations, the scope's first site
computes the gates and the others use them.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from reparam.base import Method, Site, Update, Weight, method, nearest
from reparam.methods import patterns
from reparam.methods.lora import LoRA, seeded
from reparam.methods.mixture import routers
from reparam.methods.mixture.common import Common
from reparam.methods.mixture.select import GATES, SELECTS
from reparam.methods.mixture.update import MixtureUpdate
from reparam.methods.mixture.warmup import Warmup
from reparam.settings import whole, wrong_words

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


@method("mixture")
@dataclasses.dataclass(frozen=True)
class Mixture(Method):
    """Configuration of a mixture.

    Raises ValueError for values out of range and for what cannot go together; for the sites, once they are known.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"n": 3, "r": 2, "router": "static", "scope": "model"},
        {"n": 3, "r": 2, "select": "top_k", "k": 2, "gate": "renorm", "losses": {"router_z": 1e-3}},
    )

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
    """How weights follow from logits: softmax, sigmoid (normalised), or top_k."""
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
    """Share of the optimiser's steps that the contrastive loss is off for, where their number is known."""
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
            self._lora(self.r)
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
    def each(self) -> int:
        """The rank of one expert."""
        return self.r // self.n if self.split else self.r

    def _lora(self, rank: int) -> LoRA:
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

    def shared(self, sites: list[Site]) -> Common:
        """Refuse what does not fit the sites; routers of a scope wider than a module."""
        if self.frozen and not self.ranks:
            raise ValueError(
                f"{self.name}: it mixes finished adapters and trains their weights alone; name their folders in "
                f"experts, or set frozen=false to train {self.n} new ones"
            )
        uneven = [name for name, ranks in self.ranks.items() if len(set(ranks)) > 1]
        if self.combine == "factor" and uneven:
            raise ValueError(f"{self.name}: combine='factor' needs experts of one rank, unlike those at {uneven[0]}")
        if self.select == "top_k" and self.gate == "one":
            only = ", but for losses" if self.losses else " at all: it stays as it was drawn"
            warnings.warn(f"{self.name}: gate='one' gives the router no gradient{only}; use prob or ste", stacklevel=4)
        leaders: dict[str, Site] = {}
        for site in sites:
            if not self.is_plain(site):
                leaders.setdefault(self.place(site), site)
        if not leaders:
            raise ValueError(f"{self.name}: all {len(sites)} sites are plain by {self.plain!r}, and none is a mixture")
        wide = {} if self.scope == "module" else {scope: self._router(site, scope) for scope, site in leaders.items()}
        return Common(self.tasks, wide, {scope: site.name for scope, site in leaders.items()}, self.n)

    def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> Update:
        """A fresh update, drawn from the seed and the site's name."""
        if self.is_plain(site):
            return self._lora(self.r).build(site, weight, None)
        common = self.shared([site]) if shared is None else shared
        assert isinstance(common, Common)
        tensors, ranks, scale = self._experts(site, weight)
        scope = self.place(site)
        return MixtureUpdate(
            site,
            self,
            common,
            tensors=tensors,
            ranks=ranks,
            scale=scale,
            router=self._router(site, site.name).to(weight.device) if self.scope == "module" else None,
            scope=scope,
            leads=common.leaders[scope] == site.name,
        )

    def controller(self, updates: Mapping[str, Update]) -> Warmup | None:
        """Counts steps, where the contrastive loss has to wait."""
        sites = [update for update in updates.values() if isinstance(update, MixtureUpdate)]
        waits = self.losses.get("contrastive", 0) > 0 and self.contrastive_warmup > 0
        return Warmup(sites[0].common, self.contrastive_warmup) if waits else None

    def _experts(self, site: Site, weight: Weight) -> tuple[dict[str, Tensor], tuple[int, ...], float]:
        """Parameters of the experts at a site, their ranks, and s."""
        device = weight.device
        if self.kind == "vectors":
            return {"vectors": torch.ones(self.n, site.out_features, device=device)}, (1,) * self.n, 1.0
        if self.ranks:
            ranks = self.ranks[site.name]
            A = torch.zeros(sum(ranks), site.in_features, device=device)
            return {"A": A, "B": torch.zeros(site.out_features, sum(ranks), device=device)}, tuple(ranks), 1.0
        total = self.n * self.each
        fresh = self._lora(self.each if self.kind == "shared_a" else total).build(site, weight, None)
        B = torch.zeros(site.out_features, total, device=device)
        scale = self._lora(self.r).scale(r=self.r, alpha=self.alpha)
        return {"A": fresh.A.detach(), "B": B}, (self.each,) * self.n, scale

    def _router(self, site: Site, scope: str) -> routers.Router:
        """The router of a scope, whose first site this is."""
        made = dataclasses.replace(site, name=f"{scope}:router")
        n, std, generator = self.n, self.router_std, seeded(self.seed, made)
        match self.router:
            case "static":
                return routers.Static(n, std=std, generator=generator)
            case "task_embedding":
                return routers.TaskEmbedding(len(self.tasks), n, self.task_width, std=std, generator=generator)
            case "task_logits":
                return routers.TaskLogits(len(self.tasks), n, std=std, generator=generator)
            case "two_pass":
                return routers.TwoPass(site.in_features, n, bias=self.router_bias, std=std, generator=generator)
            case "token":
                width = site.out_features if self.route_on == "activation" else site.in_features
                return routers.Token(width, n, bias=self.router_bias, std=std, generator=generator)
            case _:
                return routers.Sequence(site.in_features, n, std=std, generator=generator)
