"""The update of one site of a mixture: experts, weighted by gates from the router of the site or of its scope.

    y = W x + s · COMBINE_i(g_i, B_i A_i) x        or        y = W x + (Σ_i g_i (l_i − 1)) ∘ W x

The second form is for vectors l_i [O]. It is (Σ_i g_i l_i) ∘ W x if the weights sum to 1, and changes nothing at first
even if they do not. Biases are not scaled.

Shapes: O out_features, I in_features, N experts, R the sum of the ranks, T tokens of a flattened batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.core.base import Factors, Role, Site, Update, Weight
from reparam.core.dtypes import compute_dtype
from reparam.errors import InputDependentError
from reparam.methods.mixture import experts
from reparam.methods.mixture.auxiliary import with_losses
from reparam.methods.mixture.common import Common, key
from reparam.methods.mixture.forward import Forward
from reparam.methods.mixture.routers import Reads, Router
from reparam.methods.mixture.select import Gating, choose
from reparam.methods.mixture.settings import MixtureSettings


class MixtureUpdate(Update):
    """One site of a mixture.

    Args:
        site: the place in the model.
        method: the configuration of the mixture.
        common: the state that all sites share; held in a tuple, because the model's root owns it.
        tensors: "A" [R, I] and "B" [O, R], or "vectors" [N, O].
        ranks: rank of each expert at this site.
        scale: factor s of the experts' output.
        router: the site's own router, or None to use the router of the scope.
        scope: name of the scope.
        leads: whether this site is the first of its scope, which computes the gates from its input.
    """

    roles: ClassVar[Mapping[str, Role]] = {}
    A: Tensor  # [R, I]; with kind="shared_a" [r, I]
    B: Tensor  # [O, R]
    vectors: Tensor  # [N, O]
    slots: Tensor  # [R], the expert of each rank
    PARTS: ClassVar[Mapping[str, Role]] = {"A": "in", "B": "out", "vectors": "gain"}

    def __init__(
        self,
        site: Site,
        method: MixtureSettings,
        common: Common,
        *,
        tensors: Mapping[str, Tensor],
        ranks: tuple[int, ...],
        scale: float,
        router: Router | None,
        scope: str,
        leads: bool,
    ) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if method.frozen:
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor))
        slots = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
        device = next(iter(tensors.values())).device
        self.register_buffer("slots", slots.to(device), persistent=False)
        self.router = router
        own: dict[str, Role] = {} if method.frozen else {name: self.PARTS[name] for name in tensors}
        routes = () if router is None else router.named_parameters()
        self.roles = {**own, **{f"router.{name}": "route" for name, _ in routes}}  # type: ignore[misc]
        self.site, self.method, self.ranks, self.scale = site.name, method, ranks, scale
        self.scope, self.leads, self.experts = scope, leads, method.n
        self.owner = (common,)
        reads = (router if router is not None else common.routers[key(scope)]).reads
        self.reads: Reads = reads  # type: ignore[assignment]
        # Whether the site needs the current forward pass: its tasks, prompts or masks.
        self.depends = (
            reads in ("sequence", "hidden") or (reads == "tasks" and len(method.tasks) > 1) or bool(method.losses)
        )

    @property
    def common(self) -> Common:
        """The state that all sites share."""
        return self.owner[0]

    def forward(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [..., I] -> the frozen layer's output plus that of the experts, [..., O]."""
        common = self.owner[0]
        if common.silent:
            return weight(x, bias)
        method, now = self.method, common.now
        if self.depends:
            now.recompute(self.site)
        if method.kind == "vectors":
            y = weight(x)
            choice = self.choice(y if method.route_on == "activation" else x)
            g = now.spread(choice.weights, x.shape[:-1])
            y = torch.addcmul(y, y, g.to(y.dtype) @ (self.vectors - 1).to(y.dtype))
            y = y if bias is None else y + bias.to(y.dtype)
            return with_losses(y, x, choice, self) if method.losses else y
        choice = self.choice(x)
        rows = x.reshape(-1, x.shape[-1])  # [T, I]
        lead = x.shape[:-1]
        g = now.spread(choice.weights, lead)
        if g.ndim == 1:
            g = g[None]
        elif g.ndim != 2 or len(lead) != 1:
            g = (g if g.shape[:-1] == lead else g.expand(*lead, -1)).reshape(-1, method.n)
        y = self._low_rank(rows, g, choice, weight, bias).view(*lead, weight.out_features)
        return with_losses(y, x, choice, self) if method.losses else y

    def _low_rank(self, rows: Tensor, g: Tensor, choice: Gating, weight: Weight, bias: Tensor | None) -> Tensor:
        """rows [T, I], weights [T, N] or [1, N] -> [T, O]."""
        method = self.method
        dtype = compute_dtype(rows)
        A, B = self.A, self.B
        if A.dtype is not dtype:
            A, B = A.to(dtype), B.to(dtype)
        dropped = F.dropout(rows, method.dropout, self.training) if method.dropout else rows
        y = weight(rows, bias)
        if choice.chosen is not None and self._sparse(choice, len(rows)):
            used = choice.counted.reshape(-1, method.n)
            return experts.scatter(y, dropped.to(dtype), A, B, g, used, self.ranks, self.scale)
        if method.kind == "shared_a":
            h = experts.shared(dropped, A, g)
        elif method.combine == "factor":
            h = experts.factor(dropped, A, g)
        else:
            h = experts.delta(dropped, A, g, self.slots)
        return y.addmm_(h, B.t(), alpha=self.scale)

    def _sparse(self, choice: Gating, tokens: int) -> bool:
        """Whether each expert runs on its own tokens only, because that takes far fewer operations."""
        method = self.method
        assert choice.chosen is not None
        if torch.compiler.is_compiling() or method.kind != "low_rank":
            return False
        per_token = choice.chosen.numel() == tokens * method.n
        return (
            per_token and tokens >= SPARSE_TOKENS and sum(self.ranks) * (method.n - method.k) >= SPARSE_RANKS * method.n
        )

    # ---- gates

    def choice(self, z: Tensor) -> Gating:
        """The gates for z [..., I] in the current forward pass: [N], [B, N] by row, or [..., N] by token.

        Raises ValueError if a task is missing, and RuntimeError if the gates of the scope are not known.
        """
        common = self.owner[0]
        now, own, reads = common.now, self.router, self.reads
        router: Router = own if own is not None else common.routers[key(self.scope)]  # type: ignore[assignment]
        name = self.scope if own is None else self.site
        if reads in WHOLE:
            return self._of_forward(router, now)
        if reads == "sequence" and now.continues:
            return self._kept(now, name)
        if not self.leads:
            return self._read(now, router)
        if reads == "token":
            choice = self._chosen(router(z), now)
        else:
            by_row = now.by_row(z)
            logits = router(by_row, now.pool(by_row.shape[:-1], self.method.pool, z.device))
            choice = self._chosen(logits[0] if z.ndim == 1 else logits, now)
            if now.kept is not None:
                now.kept[name] = choice.detached()
        if own is None:
            now.gates[self.scope] = choice
        return choice

    def _of_forward(self, router: Router, now: Forward) -> Gating:
        """Gates that are the same at every site of the scope. Without gradients, the first site computes them for all.

        With gradients each site computes them, so that checkpointed parts of the model do not share a graph.
        """
        once = self.router is None and not torch.is_grad_enabled()
        if once and not self.leads and self.scope in now.gates:
            return now.gates[self.scope]
        if self.reads == "nothing":
            logits = router()
        elif self.reads == "tasks":
            logits = router(self.common.task_ids())
        else:
            logits = router(self._hidden(now, router))
        choice = self._chosen(logits, now)
        if once:
            now.gates[self.scope] = choice
        return choice

    def _hidden(self, now: Forward, router: Router) -> Tensor:
        width = router.weight.shape[1]  # type: ignore[index]
        if now.hidden is None:
            raise RuntimeError(f"{self.site}: router 'two_pass' needs a forward pass of the whole model")
        if now.hidden.shape[-1] != width:
            raise ValueError(
                f"router 'two_pass' expects the input width of the first site, {width}, but the last hidden states "
                f"have width {now.hidden.shape[-1]}; choose targets whose first site reads the residual stream"
            )
        return now.hidden

    def _chosen(self, logits: Tensor, now: Forward) -> Gating:
        method = self.method
        return choose(
            logits,
            select=method.select,
            temperature=method.temperature,
            k=method.k,
            gate=method.gate,
            allowed=now.experts,
            sample=method.select == "sigmoid" and self.training,
        )

    def _read(self, now: Forward, router: Router) -> Gating:
        choice = now.gates.get(self.scope)
        if choice is None:
            raise RuntimeError(
                f"{self.site} was used before {self.common.leaders[self.scope]}, which computes the gates of "
                f"scope {self.scope or 'model'!r}; give the mixture a narrower scope"
            )
        trains = any(p.requires_grad for p in router.parameters())
        if torch.is_grad_enabled() and trains and not choice.p.requires_grad:
            raise RuntimeError(
                f"{self.site}: the gates of scope {self.scope or 'model'!r} were computed without a gradient, in "
                f"another checkpointed part of the model; use checkpointing with use_reentrant=False"
            )
        return choice

    def _kept(self, now: Forward, name: str) -> Gating:
        if now.kept is None or name not in now.kept:
            raise RuntimeError(
                f"{self.site}: the cache holds tokens that this adapter has not seen, so the gate of the sequence is "
                f"unknown; select the adapter before the prompt is processed, and do not copy the cache"
            )
        return now.kept[name]

    # ---- the normal form

    def factors(self, weight: Weight) -> Factors:
        """The normal form. Raises InputDependentError if gates depend on tokens, or on a task that is not set."""
        g = self._known()
        if self.method.kind == "vectors":
            empty = self.vectors.new_zeros(0, weight.in_features), self.vectors.new_zeros(weight.out_features, 0)
            return Factors(*empty, 1 + g @ (self.vectors - 1))
        A, B = self.A, self.scale * self.B
        if self.method.kind == "shared_a":
            return Factors(A, (B.view(len(B), len(g), -1) * g[:, None]).sum(1))
        if self.method.combine == "factor":
            mixed = (A.view(len(g), -1, A.shape[1]) * g[:, None, None]).sum(0)
            return Factors(mixed, (B.view(len(B), len(g), -1) * g[:, None]).sum(1))
        return Factors(A, B * g[self.slots])

    def _known(self) -> Tensor:
        """Gates [N] that hold for every input. Raises InputDependentError if they depend on the input."""
        common, method = self.common, self.method
        router: Router = self.router if self.router is not None else common.routers[key(self.scope)]  # type: ignore[assignment]
        part = self.vectors if method.kind == "vectors" else self.A
        if method.n == 1 and method.gate != "one":
            return part.new_ones(1)
        if router.reads == "nothing":
            logits = router()
        elif router.reads == "tasks":
            try:
                logits = router(common.known_task().to(part.device))
            except ValueError as error:
                raise InputDependentError(f"{self.site}: router {method.router!r} reads the task: {error}") from None
        else:
            raise InputDependentError(
                f"{self.site}: the weights of router {method.router!r} depend on the input, so no single matrix "
                f"describes the mixture; use the adapter unmerged"
            )
        chosen = choose(
            logits,
            select=method.select,
            temperature=method.temperature,
            k=method.k,
            gate=method.gate,
            allowed=common.given.experts,
        )
        return chosen.weights.to(part.dtype)

    # ---- `core.base.ExpertChoice`

    def expert_choice(self) -> Self:
        """This update, which implements `ExpertChoice`."""
        return self

    def decided(self, x: Tensor, weight: Weight) -> tuple[Tensor, Tensor] | None:
        """Selected experts (bool) and p, both [T, N], for tokens of x that are not padding; None in a first pass."""
        now, lead = self.common.now, x.shape[:-1]
        if self.common.silent:
            return None
        choice = self.choice(weight(x) if self.method.route_on == "activation" else x)
        valid = now.valid(lead)
        keep = slice(None) if valid is None else valid.reshape(-1)
        told = choice.counted, choice.p
        counted, p = (now.spread(g, lead).expand(*lead, -1).reshape(-1, self.experts)[keep] for g in told)
        return counted, p

    def products(self) -> Tensor:
        """Inner products of the experts' changes, [N, N] in float64."""
        if self.method.kind == "vectors":
            return experts.products_of_vectors(self.vectors)
        return experts.products(self.A, self.B, self.slots, self.method.n)


WHOLE = ("nothing", "tasks", "hidden")  # inputs of routers that are the same at all sites of a scope
SPARSE_TOKENS = 64
SPARSE_RANKS = 64
"""The least numbers of tokens, and of unused ranks per token, for which each expert runs on its own tokens only."""
