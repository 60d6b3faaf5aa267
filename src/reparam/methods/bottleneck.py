"""Bottleneck adapters: a small network beside, or after, a frozen sub-layer.

    houlsby     y + s · U σ(D y + d) + s · u    after attention and after the MLP, before the residual is added
                                                (Houlsby et al. 2019, arXiv 1902.00751, §2.1)
    pfeiffer    the same, after the MLP alone (Pfeiffer et al. 2020, arXiv 2005.00247)
    parallel    y + s · U σ(D x + d) + s · u    beside the MLP (He et al. 2021, arXiv 2110.04366, §3)

y is what the linear map gives that ends the sub-layer: o_proj, down_proj and what they are called elsewhere. U and u
are zero at first, so that training starts at the base model, to the bit; the papers begin near it. s is 1 but for He
et al., who take 4. Houlsby et al. use GELU in their code, the others ReLU.

**Where "parallel" differs from the paper**: x is the input of that last linear map, the inner activation of the MLP,
and not the input of the MLP, which the map does not see.

The change depends on the input through σ: it is never merged, and has no place in a mixed batch.

Shapes: O out_features, I in_features, R width of the bottleneck.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.core.base import Factors, Role, Site, Update, Weight
from reparam.core.checks import finite, whole, wrong_words
from reparam.core.method import Method
from reparam.core.registry import method
from reparam.errors import InputDependentError
from reparam.methods.lora import seeded

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
AFTER_ATTENTION = r"re:.*([aA]ttn|[aA]ttention)\.(o_proj|out_proj|c_proj|dense|output\.dense|out_lin|o)"
AFTER_MLP = r"re:.*\.(down_proj|mlp\.c_proj|fc2|dense_4h_to_h|layer\.\d+\.output\.dense|wo|lin2)"
PLACEMENTS = {"houlsby": (AFTER_ATTENTION, AFTER_MLP), "pfeiffer": (AFTER_MLP,), "parallel": (AFTER_MLP,)}


@method("bottleneck")
@dataclasses.dataclass(frozen=True)
class Bottleneck(Method):
    """Configuration of bottleneck adapters.

    Raises ValueError for r below 1, a scale that is not above 0, and an unknown placement or activation.

    >>> Bottleneck(placement="pfeifer")
    Traceback (most recent call last):
    ValueError: bottleneck: placement='pfeifer': expected one of houlsby, pfeiffer, parallel
    >>> import torch, reparam
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> x = torch.randn(2, 8)
    >>> before = model(x)
    >>> adapter = reparam.attach(model, reparam.Bottleneck(r=2), targets=["0"])
    >>> torch.equal(model(x), before)  # U and u are zero at first
    True
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"r": 4, "activation": "gelu"},
        {"r": 4, "placement": "parallel", "scale": 4.0},
        {"r": 3, "placement": "pfeiffer", "activation": "silu"},
    )

    r: int = 64
    """Width of the bottleneck."""
    placement: str = "houlsby"
    """Where it goes by default, and what it reads: houlsby, pfeiffer or parallel."""
    activation: str = "relu"
    """The nonlinearity: relu, gelu or silu."""
    scale: float = 1.0
    """Factor of the branch; He et al. take 4 for parallel."""
    seed: int = 0
    """Seed of D. A site's numbers depend on the seed and its name, not on the order of wrapping."""

    def __post_init__(self) -> None:
        problems = wrong_words(self, {"placement": PLACEMENTS, "activation": ACTIVATIONS})
        if not whole(self.r, 1):
            problems.append(f"r={self.r!r}: a width is a whole number of at least 1")
        if not (finite(self.scale) and self.scale > 0):
            problems.append(f"scale={self.scale!r}: expected a finite number above 0")
        if problems:
            raise ValueError("bottleneck: " + "; ".join(problems))

    @property
    def default_targets(self) -> tuple[str, ...]:
        """The linear maps that end the sub-layers of the placement, as they are called in most models."""
        return PLACEMENTS[self.placement]

    def unsupported_reason(self, site: Site) -> str | None:
        """Only linear maps."""
        return None if site.kind == "linear" else "a bottleneck goes after, or beside, a linear map"

    def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> BottleneckUpdate:
        """D drawn from the seed and the site's name, U(-1/sqrt(n), 1/sqrt(n)) for n inputs; the rest zero."""
        n = site.in_features if self.placement == "parallel" else site.out_features
        bound = 1 / math.sqrt(n)
        down = torch.empty(self.r, n).uniform_(-bound, bound, generator=seeded(self.seed, site))
        up = torch.zeros(site.out_features, self.r)
        return BottleneckUpdate(self, down.to(weight.device), up.to(weight.device))


class BottleneckUpdate(Update):
    """The two maps of one site with their biases, as float32 masters that are cast to the compute dtype at use."""

    roles: ClassVar[Mapping[str, Role]] = {"down": "in", "down_bias": "in", "up": "out", "up_bias": "out"}

    def __init__(self, method: Bottleneck, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.method = method
        self.down = nn.Parameter(down)  # D [R, I] or [R, O]
        self.down_bias = nn.Parameter(down.new_zeros(len(down)))  # d [R]
        self.up = nn.Parameter(up)  # U [O, R]
        self.up_bias = nn.Parameter(up.new_zeros(len(up)))  # u [O]

    def forward(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [..., I] -> y = x Wᵀ + bias and the branch over y, or over x, added to it: [..., O]."""
        y = weight(x, bias)
        read = x if self.method.placement == "parallel" else y
        dtype = read.dtype
        h = ACTIVATIONS[self.method.activation](F.linear(read, self.down.to(dtype), self.down_bias.to(dtype)))
        branch = F.linear(h, self.up.to(dtype), self.up_bias.to(dtype))
        return torch.add(y, branch, alpha=self.method.scale)

    def factors(self, weight: Weight) -> Factors:
        """There are none."""
        raise InputDependentError(
            "a bottleneck adapter has a nonlinearity between its two maps, so that no one matrix stands for it: it "
            "cannot be merged, summed or used in a mixed batch; select it by its name"
        )
