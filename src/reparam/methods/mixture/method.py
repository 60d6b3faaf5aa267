"""Mixture of experts: a router weights several experts at each site.

    y = W x + s · COMBINE_i(g_i, B_i A_i) x        g = SELECT(ROUTER(its input)),  N experts

The mixtures of the literature are presets of this method (`presets.py`). A router has a scope: the module, the layer
(modules of one parent), the block (one of a repeated stack) or the model. If it reads activations, the first site of
the scope computes the gates and the other sites use them.
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
    """Mixture of experts: a router weights several LoRA experts, or vectors, at each site.

    Raises ValueError for values out of range and for settings that conflict. `attach` raises it for settings that do
    not fit the sites.

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
        """Raise ValueError if frozen experts are missing, their ranks do not fit `combine`, or all sites are plain."""
        if self.frozen and not self.ranks:
            raise ValueError(
                f"{self.name}: it combines trained adapters and trains only the router; name their folders in experts, "
                f"or set frozen=false to train {self.n} new ones"
            )
        uneven = [name for name, ranks in self.ranks.items() if len(set(ranks)) > 1]
        if self.combine == "factor" and uneven:
            raise ValueError(f"{self.name}: combine='factor' needs experts of equal rank; they differ at {uneven[0]}")
        if all(map(self.is_plain, sites)):
            raise ValueError(f"{self.name}: plain={self.plain!r} matches all {len(sites)} sites and leaves no mixture")

    def idle_settings(self) -> list[str]:
        """A sentence if the router that was asked to have a bias has none."""
        if not self.router_bias or self.router in ("token", "two_pass"):
            return []
        return [
            f"{self.name}: router_bias=true has no effect with router={self.router!r}, which has no bias; set "
            f"router_bias=false, or use router='token' or 'two_pass'"
        ]

    def notes(self, sites: list[Site]) -> list[str]:
        """A warning if the task's loss gives the router no gradient."""
        if self.select != "top_k" or self.gate != "one":
            return []
        only = " except from auxiliary losses" if self.losses else " at all, so it stays as it was initialized"
        return [f"{self.name}: gate='one' gives the router no gradient{only}; use prob or ste"]

    def shared(self, sites: list[Site]) -> Common:
        """The shared state: routers of a scope wider than a module, and the current forward pass."""
        leaders: dict[str, Site] = {}
        for site in sites:
            if not self.is_plain(site):
                leaders.setdefault(self.place(site), site)
        wide = {} if self.scope == "module" else {scope: self._router(site, scope) for scope, site in leaders.items()}
        return Common(self.tasks, wide, {scope: site.name for scope, site in leaders.items()}, self.n)

    def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> Update:
        """A new update, drawn from the seed and the site's name: a mixture, or LoRA at a plain site."""
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
        """The warmup of the contrastive loss, if there is one."""
        sites = [update for update in updates.values() if isinstance(update, MixtureUpdate)]
        waits = self.losses.get("contrastive", 0) > 0 and self.contrastive_warmup > 0
        return Warmup(sites[0].common, self.contrastive_warmup) if waits else None

    def _experts(self, site: Site, weight: Weight) -> tuple[dict[str, Tensor], tuple[int, ...], float]:
        """Initial tensors of the experts at a site, by name; the experts' ranks; and the scale s."""
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
        """A new router for a scope, given the first site of the scope."""
        made = dataclasses.replace(site, name=f"{scope}:router")
        n, std, generator = self.n, self.router_std, seeded(self.seed, made)
        width = site.out_features if self.route_on == "activation" else site.in_features
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
                return routers.Token(width, n, bias=self.router_bias, std=std, generator=generator)
            case _:
                return routers.Sequence(width, n, std=std, generator=generator)
