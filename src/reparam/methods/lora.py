"""LoRA: a low-rank update of a frozen weight matrix (Hu et al. 2021, arXiv 2106.09685, §4.1).

    h = W₀ x + s · B A x        A [R, I] random, B [O, R] zero, so that training starts at the base model

`scaling` selects the scale s: "alpha_over_r" is α/r, as in the paper and PEFT; "alpha" is α itself, for papers that
write h = W₀x + αBAx; "rslora" is α/√r (Kalajdzievski 2023, arXiv 2312.03732); "none" is 1.
The paper draws A from a Gaussian; its released code and PEFT draw A from U(−1/√I, 1/√I), which is the default here.

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
from reparam.core.text import counted
from reparam.methods import patterns

SCALINGS = ("alpha_over_r", "alpha", "rslora", "none")
INITS = ("kaiming_uniform", "gaussian")


@method("lora")
@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """LoRA (Hu et al. 2021, arXiv 2106.09685): trains a low-rank update of each frozen weight matrix.

    Raises ValueError for a rank below 1, alpha not above 0, dropout outside [0, 1), an unknown scaling or init,
    init_std without init="gaussian", and an invalid pattern. `attach` raises it for a pattern that matches no site.

    >>> LoRA(r=8, alpha=16).scale(r=8, alpha=16)
    2.0
    >>> import torch, reparam
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> adapter = reparam.attach(model, reparam.LoRA(r=2), targets=["0"])
    >>> sum(p.numel() for p in adapter.parameters())  # R (I + O)
    28
    """

    has_components: ClassVar[bool] = True
    ties: ClassVar[bool] = True
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"r": 4, "alpha": 8},
        {"r": 1, "alpha": 2.0, "scaling": "alpha", "init": "gaussian"},
        {"r": 4, "alpha": 4, "scaling": "rslora", "dropout": 0.1, "rank_pattern": {"q_proj|c_attn": 2}},
    )

    r: int = 8
    """Rank of the update."""
    alpha: float = 16.0
    """Numerator of the scale: by default the update is multiplied by alpha / r."""
    scaling: str = "alpha_over_r"
    """Scale of the update: alpha_over_r, alpha, rslora (alpha / sqrt(r)) or none (1)."""
    dropout: float = 0.0
    """Dropout probability on the input of the low-rank branch, in training. Embeddings have no dropout."""
    init: str = "kaiming_uniform"
    """Distribution of A: kaiming_uniform is U(±1/sqrt(I)), gaussian is N(0, init_std²). Embeddings use gaussian."""
    init_std: float | None = None
    """Standard deviation of init=gaussian; by default 1/sqrt(3 I), as kaiming_uniform has, and 1 for embeddings."""
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Ranks of single sites: a regular expression that matches the end of the path -> rank. The first match wins."""
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Alphas of single sites, with patterns as in rank_pattern."""
    seed: int = 0
    """Seed for A. The values depend on the seed and the site's name, not on the order in which sites are wrapped."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
        """The factor s of an update with this rank and alpha."""
        return {"alpha_over_r": alpha / r, "alpha": alpha, "rslora": alpha / math.sqrt(r), "none": 1.0}[self.scaling]

    def at(self, name: str) -> tuple[int, float]:
        """Rank and alpha of the site with this path, after the patterns."""
        return patterns.first(self.rank_pattern, name, self.r), patterns.first(self.alpha_pattern, name, self.alpha)

    def with_ranks(self, ranks: Mapping[str, int]) -> Self:
        """A configuration with these ranks by site path; alphas stay the same. Sites of rank 0 are left out.

        Raises ValueError if every rank is 0.
        """
        kept = {name: rank for name, rank in ranks.items() if rank}
        if all(self.at(name)[0] == rank for name, rank in ranks.items()):
            return self
        if not kept:
            raise ValueError(f"{self.name}: every site has rank 0, which leaves no update")
        most = max(kept.values())
        alphas = {name: self.at(name)[1] for name in kept}
        return dataclasses.replace(
            self,
            r=most,
            rank_pattern=patterns.exactly({name: rank for name, rank in kept.items() if rank != most}),
            alpha_pattern=patterns.exactly({name: alpha for name, alpha in alphas.items() if alpha != self.alpha}),
        )

    def renamed(self, names: Mapping[str, str]) -> Self:
        """A configuration with the same ranks and alphas at sites with other paths (old -> new)."""
        at = {new: self.at(old) for old, new in names.items()}
        return dataclasses.replace(
            self,
            rank_pattern=patterns.exactly({new: r for new, (r, _) in at.items() if r != self.r}),
            alpha_pattern=patterns.exactly({new: alpha for new, (_, alpha) in at.items() if alpha != self.alpha}),
        )

    def check(self, sites: list[Site]) -> None:
        """Raise ValueError for a pattern that matches no site."""
        for field in ("rank_pattern", "alpha_pattern"):
            patterns.check_used(field, getattr(self, field), [site.name for site in sites], method="LoRA")

    def notes(self, sites: list[Site]) -> list[str]:
        """A warning for sites whose rank exceeds min(O, I)."""
        high = [s for s in sites if self.at(s.name)[0] > min(s.out_features, s.in_features)]
        if not high:
            return []
        return [
            f"LoRA: the rank exceeds min(out_features, in_features) at {counted(len(high), 'site')} (first: "
            f"{high[0].name}, {high[0].out_features} x {high[0].in_features}); set rank_pattern to lower it there"
        ]

    def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> LoRAUpdate:
        """A new update: A is drawn from the seed and the site's name, B is zero."""
        r, alpha = self.at(site.name)
        generator = seeded(self.seed, site)
        a = torch.empty(r, site.in_features)
        bound = 1 / math.sqrt(site.in_features)
        if site.kind == "embedding":  # as in loralib and PEFT: B [vocabulary, R] is zero, A is N(0, 1)
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
    """A random generator for one site, seeded with the seed and the site's name, independent of the order of sites."""
    digest = hashlib.sha256(f"{seed}:{site.name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class LoRAUpdate(Update):
    """LoRA's factors A and B of one site: float32 master weights, cast to the compute dtype in `forward`."""

    roles: ClassVar[Mapping[str, Role]] = {"A": "in", "B": "out"}

    def __init__(self, a: Tensor, b: Tensor, *, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.A = nn.Parameter(a)  # [R, I]
        self.B = nn.Parameter(b)  # [O, R]
        self.scale = scale
        self.dropout = dropout

    def forward(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [..., I] -> x Wᵀ + bias + s (drop(x) Aᵀ) Bᵀ [..., O]. One addmm adds the low-rank product in place."""
        rows = x.reshape(-1, x.shape[-1])  # [N, I]: two dimensions, so that addmm_ works on y directly
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
            B_t = B_t.contiguous()  # a contiguous operand makes the product for its gradient faster
        y = weight(rows, bias).addmm_(self.weighed(h_t).t(), B_t, alpha=self.scale)
        return y.view(*x.shape[:-1], weight.out_features)  # explicit sizes and not -1, because a batch may be empty

    def weighed(self, h_t: Tensor) -> Tensor:
        """A xᵀ [R, N], unchanged; a subclass can weight each component here, between the two factors."""
        return h_t

    def product(self) -> tuple[Tensor, Tensor, float] | None:
        """A, B and s, unless dropout acts or a subclass computes something else."""
        plain = type(self).forward is LoRAUpdate.forward and type(self).weighed is LoRAUpdate.weighed
        return (self.A, self.B, self.scale) if plain and not (self.dropout and self.training) else None

    def factors(self, weight: Weight) -> Factors:
        """The factors A [R, I] and s · B [O, R]."""
        return Factors(self.A, self.scale * self.B)

    def low_rank_part(self) -> tuple[Update, str]:
        """This update itself, with no prefix before its tensor names."""
        return self, ""

    def from_svd(self, u: Tensor, s: Tensor, vh: Tensor) -> dict[str, Tensor]:
        """A = sqrt(s) Vh [R, I] and B = U sqrt(s) / scale [O, R], whose update is U diag(s) Vh."""
        root = s.sqrt()
        return {"A": root[:, None] * vh, "B": u * root / self.scale}


class _Down(torch.autograd.Function):
    """x [N, I], A [R, I] -> x itself, and A xᵀ [R, N].

    The function also returns x, so that `backward` receives the gradient from the frozen layer and can add the
    branch's gradient to it in place. This saves the pass over [N, I] in which autograd would add the two. Changing that
    gradient in place is safe, because the returned x is passed to the frozen layer only.
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
            g_x = g_x.addmm_(g_h, A)  # before the gradient of A, while g_x is still in the cache
        return g_x, g_h_t @ x if ctx.needs_input_grad[1] else None
