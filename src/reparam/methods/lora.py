"""LoRA: a low-rank change of a frozen matrix (Hu et al. 2021, arXiv 2106.09685, §4.1).

    h = W₀ x + s · B A x        A [R, I] random, B [O, R] zero, so that training starts at the base model

The scale s has four conventions (`scaling`): "alpha_over_r" is α/r, the paper's and PEFT's; "alpha" is α itself, for
texts that write h = W₀x + αBAx; "rslora" is α/√r (Kalajdzievski 2023, arXiv 2312.03732); "none" is 1.
The paper says that A is Gaussian; the released code and PEFT draw U(−1/√I, 1/√I), and so does the default here.

Shapes: O out_features, I in_features, R rank, N rows of a flattened batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.core.base import Factors, Role, Site, Update, Weight
from reparam.core.checks import whole, wrong_words
from reparam.core.dtypes import compute_dtype
from reparam.core.method import Method
from reparam.core.registry import method
from reparam.methods import patterns

SCALINGS = ("alpha_over_r", "alpha", "rslora", "none")
INITS = ("kaiming_uniform", "gaussian")


@method("lora")
@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """Configuration of LoRA.

    Raises ValueError for r below 1, alpha not above 0, dropout outside [0, 1), an unknown scaling or init, and, once
    the sites are known, for a pattern that matches none of them.

    >>> LoRA(r=8, alpha=16).scale(r=8, alpha=16)
    2.0
    >>> import torch, reparam
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> adapter = reparam.attach(model, reparam.LoRA(r=2), targets=["0"])
    >>> sum(p.numel() for p in adapter.parameters())  # R (I + O)
    28
    """

    has_components: ClassVar[bool] = True
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"r": 4, "alpha": 8},
        {"r": 1, "alpha": 2.0, "scaling": "alpha", "init": "gaussian"},
        {"r": 4, "alpha": 4, "scaling": "rslora", "dropout": 0.1, "rank_pattern": {"q_proj|c_attn": 2}},
    )

    r: int = 8
    """Rank of the change."""
    alpha: float = 16.0
    """Numerator of the scale."""
    scaling: str = "alpha_over_r"
    """How the scale follows from alpha and r: alpha_over_r, alpha, rslora or none."""
    dropout: float = 0.0
    """Probability with which an element of the branch's input is zeroed in training. Embeddings have none."""
    init: str = "kaiming_uniform"
    """Distribution of A: kaiming_uniform is U(-1/sqrt(I), 1/sqrt(I)), gaussian is N(0, init_std²)."""
    init_std: float | None = None
    """Standard deviation of gaussian; by default 1/sqrt(3 I), the second moment of kaiming_uniform."""
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Ranks that differ, by site: a regular expression for the end of the path -> rank. The first match counts."""
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Alphas that differ, by site, in the same way."""
    seed: int = 0
    """Seed of A. A site's numbers depend on the seed and its name, not on the order of wrapping."""

    def __post_init__(self) -> None:
        ranks = {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}
        alphas = {"alpha": self.alpha, **{f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}}
        problems = [
            f"{key}={value!r}: a rank is a whole number of at least 1"
            for key, value in ranks.items()
            if not whole(value, 1)
        ]
        problems += [
            f"{key}={value!r}: expected a finite number above 0"
            for key, value in alphas.items()
            if not (isinstance(value, int | float) and math.isfinite(value) and value > 0)
        ]
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout={self.dropout!r}: expected a probability in [0, 1)")
        problems += wrong_words(self, {"scaling": SCALINGS, "init": INITS})
        if self.init_std is not None and not (self.init == "gaussian" and 0 < self.init_std < math.inf):
            problems.append(f"init_std={self.init_std!r}: only for init='gaussian', and a finite number above 0")
        for field in ("rank_pattern", "alpha_pattern"):
            problems += patterns.broken(field, getattr(self, field))
        if problems:
            raise ValueError("LoRA: " + "; ".join(problems))

    def scale(self, *, r: int, alpha: float) -> float:
        """The factor s for a site of rank r and this alpha."""
        return {"alpha_over_r": alpha / r, "alpha": alpha, "rslora": alpha / math.sqrt(r), "none": 1.0}[self.scaling]

    def at(self, name: str) -> tuple[int, float]:
        """Rank and alpha of the site with this path."""
        return patterns.first(self.rank_pattern, name, self.r), patterns.first(self.alpha_pattern, name, self.alpha)

    def with_ranks(self, ranks: Mapping[str, int]) -> Self:
        """With these ranks, and the alphas that the sites have; sites of rank 0 are no sites any more."""
        kept = {name: rank for name, rank in ranks.items() if rank}
        if all(self.at(name)[0] == rank for name, rank in ranks.items()):
            return self
        most = max(kept.values())
        alphas = {name: self.at(name)[1] for name in kept}
        return dataclasses.replace(
            self,
            r=most,
            rank_pattern=patterns.exactly({name: rank for name, rank in kept.items() if rank != most}),
            alpha_pattern=patterns.exactly({name: alpha for name, alpha in alphas.items() if alpha != self.alpha}),
        )

    def check(self, sites: list[Site]) -> None:
        """Refuse patterns that match no site."""
        for field in ("rank_pattern", "alpha_pattern"):
            patterns.check_used(field, getattr(self, field), [site.name for site in sites], method="LoRA")

    def notes(self, sites: list[Site]) -> list[str]:
        """Where the rank is no longer low."""
        high = [s for s in sites if self.at(s.name)[0] > min(s.out_features, s.in_features)]
        if not high:
            return []
        return [
            f"LoRA: the rank exceeds the smaller side of {len(high)} sites (first: {high[0].name}, "
            f"{high[0].out_features} x {high[0].in_features}); set rank_pattern to lower it there"
        ]

    def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> LoRAUpdate:
        """A fresh update, drawn from the seed and the site's name."""
        r, alpha = self.at(site.name)
        generator = seeded(self.seed, site)
        a = torch.empty(r, site.in_features)
        bound = 1 / math.sqrt(site.in_features)
        if site.kind == "embedding":  # loralib and PEFT: zeros on the vocabulary's side, N(0, 1) on the other
            a.normal_(0, self.init_std or 1.0, generator=generator)
        elif self.init == "gaussian":
            a.normal_(0, self.init_std or bound / math.sqrt(3), generator=generator)
        else:
            a.uniform_(-bound, bound, generator=generator)
        b = torch.zeros(site.out_features, r)
        return LoRAUpdate(
            a.to(weight.device), b.to(weight.device), scale=self.scale(r=r, alpha=alpha), dropout=self.dropout
        )


def seeded(seed: int, site: Site) -> torch.Generator:
    """The random numbers of one site: they depend on its name, not on the order of the sites."""
    digest = hashlib.sha256(f"{seed}:{site.name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class LoRAUpdate(Update):
    """The two factors of one site, as float32 masters that are cast to the compute dtype at use."""

    roles: ClassVar[Mapping[str, Role]] = {"A": "in", "B": "out"}

    def __init__(self, a: Tensor, b: Tensor, *, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.A = nn.Parameter(a)  # [R, I]
        self.B = nn.Parameter(b)  # [O, R]
        self.scale = scale
        self.dropout = dropout

    def forward(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [..., I] -> x Wᵀ + bias + s (drop(x) Aᵀ) Bᵀ [..., O]. The small product is added in place, by one addmm."""
        rows = x.reshape(-1, x.shape[-1])  # [N, I]: two dimensions, so that addmm needs no view of its target
        A: Tensor = self.A
        B_t = self.B.t()
        dtype = compute_dtype(x)
        if dtype is not A.dtype:
            A, B_t = A.to(dtype), B_t.to(dtype)
        if self.dropout and self.training:
            h_t = F.linear(A, F.dropout(rows, self.dropout))  # [R, N]
        elif torch.compiler.is_compiling() or not torch.is_grad_enabled() or rows.dtype != dtype:
            h_t = F.linear(A, rows)
        else:
            rows, h_t = _Down.apply(rows, A)
            B_t = B_t.contiguous()  # so that its gradient is one of the fast products
        y = weight(rows, bias).addmm_(self.weighed(h_t).t(), B_t, alpha=self.scale)
        return y.view(*x.shape[:-1], weight.out_features)  # sizes, not -1: a batch may be empty

    def weighed(self, h_t: Tensor) -> Tensor:
        """h_t [R, N] between the two factors, where an update weighs its components; here as it is."""
        return h_t

    def factors(self, weight: Weight) -> Factors:
        """A, and s · B."""
        return Factors(self.A, self.scale * self.B)

    def low_rank_part(self) -> tuple[Update, str]:
        """All of it."""
        return self, ""

    def from_svd(self, u: Tensor, s: Tensor, vh: Tensor) -> dict[str, Tensor]:
        """A = sqrt(s) Vh and B = U sqrt(s) / scale."""
        root = s.sqrt()
        return {"A": root[:, None] * vh, "B": u * root / self.scale}


class _Down(torch.autograd.Function):
    """x [N, I], A [R, I] -> x itself, and A xᵀ [R, N].

    x goes through so that its gradient from the frozen map arrives here and takes the branch's share in place: one
    pass over [N, I] less than when autograd adds two gradients. Nothing else sees that gradient, because the x that is
    returned is only ever handed to the frozen map.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, A)
        through = x.view_as(x)
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(through)
        return through, F.linear(A, x)

    @staticmethod
    def backward(ctx: Any, g_x: Tensor | None, g_h_t: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, A = ctx.saved_tensors
        g_h = g_h_t.t()
        if not ctx.needs_input_grad[0]:
            g_x = None
        elif g_x is None:
            g_x = g_h @ A
        else:
            g_x = g_x.addmm_(g_h, A)  # before g_A: g_x has just been written and is in the cache
        return g_x, g_h_t @ x if ctx.needs_input_grad[1] else None
