"""Mixtures of experts at the sites of an adapter, as one method: experts, a router, what is selected, how it combines.

    y = W x + s · COMBINE_i(g_i, B_i A_i) x        g = SELECT(ROUTER(what it may look at)),  N experts

The systems of the literature are settings of it (`presets.py`). A router has a scope: the module, the layer (modules
of one parent), the block (of a repeated stack) or the model; where it looks at activations, the scope's first site
computes the gates and the others use them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from reparam.core.base import Site, Update, Weight
from reparam.core.registry import method
from reparam.methods.lora import seeded
from reparam.methods.mixture import routers
from reparam.methods.mixture.common import Common
from reparam.methods.mixture.settings import MixtureSettings
from reparam.methods.mixture.update import MixtureUpdate
from reparam.methods.mixture.warmup import Warmup


@method("mixture")
@dataclasses.dataclass(frozen=True)
class Mixture(MixtureSettings):
    """Configuration of a mixture.

    Raises ValueError for values out of range and for what cannot go together; for the sites, once they are known.

    >>> import torch, reparam
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> adapter = reparam.attach(model, reparam.Mixture(n=3, r=2), targets=["0"])
    >>> sum(p.numel() for p in adapter.parameters())  # three LoRAs, and a router [3, 8]
    108
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"n": 3, "r": 2, "router": "static", "scope": "model"},
        {"n": 3, "r": 2, "select": "top_k", "k": 2, "gate": "renorm", "losses": {"router_z": 1e-3}},
    )

    def check(self, sites: list[Site]) -> None:
        """Refuse finished adapters that were not read or do not fit together, and sites that are all plain."""
        if self.frozen and not self.ranks:
            raise ValueError(
                f"{self.name}: it mixes finished adapters and trains their weights alone; name their folders in "
                f"experts, or set frozen=false to train {self.n} new ones"
            )
        uneven = [name for name, ranks in self.ranks.items() if len(set(ranks)) > 1]
        if self.combine == "factor" and uneven:
            raise ValueError(f"{self.name}: combine='factor' needs experts of one rank, unlike those at {uneven[0]}")
        if all(map(self.is_plain, sites)):
            raise ValueError(f"{self.name}: all {len(sites)} sites are plain by {self.plain!r}, and none is a mixture")

    def notes(self, sites: list[Site]) -> list[str]:
        """Whether nothing teaches the router."""
        if self.select != "top_k" or self.gate != "one":
            return []
        only = ", but for losses" if self.losses else " at all: it stays as it was drawn"
        return [f"{self.name}: gate='one' gives the router no gradient{only}; use prob or ste"]

    def shared(self, sites: list[Site]) -> Common:
        """Routers of a scope wider than a module, and what is known of the current forward."""
        leaders: dict[str, Site] = {}
        for site in sites:
            if not self.is_plain(site):
                leaders.setdefault(self.place(site), site)
        wide = {} if self.scope == "module" else {scope: self._router(site, scope) for scope, site in leaders.items()}
        return Common(self.tasks, wide, {scope: site.name for scope, site in leaders.items()}, self.n)

    def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> Update:
        """A fresh update, drawn from the seed and the site's name."""
        if self.is_plain(site):
            return self.lora(self.r).build(site, weight, None)
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
        fresh = self.lora(self.each if self.kind == "shared_a" else total).build(site, weight, None)
        B = torch.zeros(site.out_features, total, device=device)
        scale = self.lora(self.r).scale(r=self.r, alpha=self.alpha)
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
