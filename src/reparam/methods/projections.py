"""Fixed random linear maps P: R^d -> R^D, drawn from a key at every use and never stored.

| kind     | P                                                                        | time       | memory in use |
|----------|--------------------------------------------------------------------------|------------|---------------|
| fastfood | see `kernels.fastfood`                                                   | O(D log d) | O(d)          |
| dense    | N(0, 1), columns scaled to norm 1                                        | O(D d)     | O(D d)        |
| sparse   | 1 or -1 with probability 1 / (2 √D) each, else 0, columns scaled to norm 1 | O(d √D)  | O(d √D)       |

The dense and the sparse map are those of Li et al. 2018 (arXiv 1804.08838). The backward pass of a map applies its
adjoint Pᵀ, so that no tensor is saved for it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from reparam.kernels.fastfood import fastfood, fastfood_adjoint, normals, words
from reparam.kernels.fastfood_tables import VERSION
from reparam.kernels.fwht import power_of_two

KINDS = ("fastfood", "dense", "sparse")
LAYOUTS = ("stacked", "padded")


def key_of(seed: int, name: str) -> int:
    """The key of a tensor, from 0 to 2^63 - 1: a hash of the seed, the tensor's name and the version of the maps."""
    digest = hashlib.sha256(f"projection {VERSION}:{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclasses.dataclass(frozen=True)
class Projection:
    """One random map P: R^d -> R^D, which its kind, key and sizes determine.

    >>> p = Projection("fastfood", key=1, d=3, rows=5)
    >>> p(torch.zeros(3)).shape, p.adjoint(torch.zeros(5)).shape
    (torch.Size([5]), torch.Size([3]))
    """

    kind: str
    """fastfood, dense or sparse."""
    key: int
    """Seed of its random numbers, from 0 to 2^63 - 1."""
    d: int
    """Length of the input."""
    rows: int
    """D, the length of the output."""
    layout: str = "stacked"
    """Layout of fastfood: stacked (blocks of 2^⌈log₂ d⌉ rows) or padded (one block of at least D, as released)."""

    @property
    def block(self) -> int:
        """n, the number of rows of a block of fastfood, a power of two."""
        return power_of_two(self.d if self.layout == "stacked" else max(self.d, self.rows))

    def __call__(self, x: Tensor) -> Tensor:
        """x [d] -> P x [D], differentiable."""
        if self.kind == "fastfood":
            return fastfood(x, self.key, self.block, self.rows)
        found: Tensor = _Map.apply(x, self)
        return found

    def adjoint(self, g: Tensor) -> Tensor:
        """g [D] -> Pᵀ g [d]."""
        if self.kind == "fastfood":
            return fastfood_adjoint(g, self.key, self.block, self.d)
        if self.kind == "dense":
            return dense(self, g.device).to(g.dtype).t() @ g
        row, column, value = sparse(self, g.device)
        return g.new_zeros(self.d).index_add_(0, column, value.to(g.dtype) * g[row])

    def forward(self, x: Tensor) -> Tensor:
        """x [d] -> P x [D], for use inside an autograd function."""
        if self.kind == "fastfood":
            return fastfood(x, self.key, self.block, self.rows)
        if self.kind == "dense":
            return dense(self, x.device).to(x.dtype) @ x
        row, column, value = sparse(self, x.device)
        return x.new_zeros(self.rows).index_add_(0, row, value.to(x.dtype) * x[column])


class _Map(torch.autograd.Function):
    """x [d] -> P x [D]; the gradient of x is Pᵀ g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, projection: Projection) -> Tensor:
        ctx.projection = projection
        return projection.forward(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.projection.adjoint(g), None


def dense(p: Projection, device: torch.device | None = None) -> Tensor:
    """The dense map as a matrix P [D, d], float32."""
    matrix = normals(words(p.key, 0, p.rows * p.d, device)).view(p.rows, p.d)
    return matrix / matrix.double().norm(dim=0).float()


def sparse(p: Projection, device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column (int64) and value (float32) of the nonzero entries of the sparse map, column by column.

    Distances between nonzero entries have a geometric distribution, so that they can be drawn without the zeros.
    """
    density, total = 1 / math.sqrt(p.rows), p.rows * p.d
    mean = total * density
    hashes = words(p.key, 0, int(mean + 8 * math.sqrt(mean) + 16), device)
    if density < 1:
        uniform = ((hashes >> 11) & ((1 << 53) - 1)).double().add(0.5) / (1 << 53)
        gaps = (uniform.log() / math.log1p(-density)).floor().long() + 1
        places = gaps.cumsum(0) - 1
    else:
        places = torch.arange(len(hashes), device=device)
    inside = places < total
    places, value = places[inside], 1.0 - 2.0 * (hashes[inside] & 1).float()
    column = places // p.rows
    count = torch.bincount(column, minlength=p.d).clamp(min=1)
    return places % p.rows, column, value * count.float().rsqrt()[column]
