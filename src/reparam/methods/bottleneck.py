"""Bottleneck adapters: a small trained network after, or parallel to, a frozen sub-layer.

    houlsby     y + s · U σ(D y + d) + s · u    after attention and after the MLP, before the residual is added
                                                (Houlsby et al. 2019, arXiv 1902.00751, §2.1)
    pfeiffer    the same, after the MLP only (Pfeiffer et al. 2020, arXiv 2005.00247)
    parallel    y + s · U σ(D x + d) + s · u    parallel to the MLP (He et al. 2021, arXiv 2110.04366, §3)

x and y are the input and the output of the last linear layer of the sub-layer, such as o_proj or down_proj. U and u are
zero at first, so that training starts exactly at the base model; the papers start near it. s is 4 for He et al. and 1
for the others. The code of Houlsby et al. uses GELU, the others use ReLU.

**Where "parallel" differs from the paper**: x is the input of the last linear layer, which is the inner activation of
the MLP. In the paper it is the input of the MLP, which this layer does not receive.

The nonlinearity σ makes the change depend on the input: a bottleneck cannot be merged or used in a mixed batch.

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
    """Bottleneck adapters (Houlsby et al. 2019 and others): a small network after, or parallel to, linear layers.

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
    """Default targets and input of the bottleneck: houlsby, pfeiffer or parallel."""
    activation: str = "relu"
    """The nonlinearity: relu, gelu or silu."""
    scale: float = 1.0
    """Factor of the bottleneck's output, above 0; He et al. use 4 with parallel."""
    seed: int = 0
    """Seed for D. The values depend on the seed and the site's name, not on the order in which sites are wrapped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = wrong_words(self, {"placement": PLACEMENTS, "activation": ACTIVATIONS})
        if not whole(self.r, 1):
            problems.append(f"r={self.r!r}: expected a whole number of at least 1")
        if not (finite(self.scale) and self.scale > 0):
            problems.append(f"scale={self.scale!r}: expected a finite number above 0")
        if problems:
            raise ValueError("bottleneck: " + "; ".join(problems))

    @property
    def default_targets(self) -> tuple[str, ...]:
        """Patterns for the last linear layers of the sub-layers of this placement, by their usual names."""
        return PLACEMENTS[self.placement]

    def unsupported_reason(self, site: Site) -> str | None:
        """The reason if the site is not a linear layer, else None."""
        return None if site.kind == "linear" else "a bottleneck needs a linear layer"

    def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> BottleneckUpdate:
        """A new update: D is U(±1/sqrt(n)) for n inputs, drawn from the seed and the site's name; the rest is zero."""
        n = site.in_features if self.placement == "parallel" else site.out_features
        bound = 1 / math.sqrt(n)
        down = torch.empty(self.r, n).uniform_(-bound, bound, generator=seeded(self.seed, site))
        up = torch.zeros(site.out_features, self.r)
        return BottleneckUpdate(self, down.to(weight.device), up.to(weight.device))


class BottleneckUpdate(Update):
    """The two linear layers of a bottleneck: float32 master weights, cast to the compute dtype in `forward`."""

    roles: ClassVar[Mapping[str, Role]] = {"down": "in", "down_bias": "in", "up": "out", "up_bias": "out"}

    def __init__(self, method: Bottleneck, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.method = method
        self.down = nn.Parameter(down)  # D [R, I] or [R, O]
        self.down_bias = nn.Parameter(down.new_zeros(len(down)))  # d [R]
        self.up = nn.Parameter(up)  # U [O, R]
        self.up_bias = nn.Parameter(up.new_zeros(len(up)))  # u [O]

    def forward(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [..., I] -> y + s · branch [..., O], with y = x Wᵀ + bias; the branch reads y, or x if parallel."""
        y = weight(x, bias)
        read = x if self.method.placement == "parallel" else y
        dtype = read.dtype
        h = ACTIVATIONS[self.method.activation](F.linear(read, self.down.to(dtype), self.down_bias.to(dtype)))
        branch = F.linear(h, self.up.to(dtype), self.up_bias.to(dtype))
        return torch.add(y, branch, alpha=self.method.scale)

    def factors(self, weight: Weight) -> Factors:
        """Raise InputDependentError: the nonlinearity has no normal form."""
        raise InputDependentError(
            "a bottleneck adapter has a nonlinearity, so no single matrix describes its update: it cannot be merged, "
            "summed or used in a mixed batch; select it by its name"
        )
