"""Routers: modules that compute the logits of N experts. `select.py` turns logits into weights.

    router           reads                                                   logits
    static           nothing: the logits are parameters                      [N]
    task_embedding   the task: W e_t (MOELoRA, Liu et al. 2023, §4)          [N], or [B, N] with one task per row
    task_logits      the task: one row of logits per task (Polytropon)       [N], or [B, N] with one task per row
    token            each token's vector: W z + b                            [..., N]
    two_pass         the base's last hidden states (X-LoRA): W z + b         [B, L, N]
    sequence         the normalized mean of a sequence's vectors (MoLE)      [B, N]

All logits are computed in float32 or wider, also under autocast. `std` is the standard deviation of the initial
parameters; None selects the usual initialization of the router.

Shapes: N experts, B rows, L tokens of a row, I width of the vectors that the router reads.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.core.dtypes import wide
from reparam.core.placing import Stays

Reads = Literal["nothing", "tasks", "token", "sequence", "hidden"]


class Router(Stays):
    """Base class of routers; `reads` names the input."""

    reads: ClassVar[Reads]


class Static(Router):
    """Logits [N] that do not depend on the input; by default 0 at first."""

    reads = "nothing"

    def __init__(self, n: int, *, std: float | None, generator: torch.Generator) -> None:
        super().__init__()
        self.logits = nn.Parameter(_drawn((n,), std, 0.0, generator))

    def forward(self) -> Tensor:
        """The logits [N]."""
        return self.logits


class TaskEmbedding(Router):
    """Logits W e_t, with an embedding e_t from N(0, 1) for each task; W is initialized as in `nn.Linear`."""

    reads = "tasks"

    def __init__(self, tasks: int, n: int, width: int, *, std: float | None, generator: torch.Generator) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(tasks, width).normal_(generator=generator))
        self.weight = nn.Parameter(_linear((n, width), std, generator))

    def forward(self, tasks: Tensor) -> Tensor:
        """Task numbers [...] -> [..., N]."""
        return _exact(F.embedding(tasks, self.embedding), self.weight)


class TaskLogits(Router):
    """One row of logits for each task, by default drawn from U(±1e-3)."""

    reads = "tasks"

    def __init__(self, tasks: int, n: int, *, std: float | None, generator: torch.Generator) -> None:
        super().__init__()
        self.logits = nn.Parameter(_drawn((tasks, n), std, 1e-3, generator))

    def forward(self, tasks: Tensor) -> Tensor:
        """Task numbers [...] -> [..., N]."""
        return F.embedding(tasks, self.logits)


class Token(Router):
    """Logits W z + b of each token; W and b are initialized as in `nn.Linear`."""

    reads: ClassVar[Reads] = "token"

    def __init__(self, width: int, n: int, *, bias: bool, std: float | None, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(_linear((n, width), std, generator))
        start = _drawn((n,), None if std is None else 0.0, 1 / math.sqrt(width), generator)
        self.bias = nn.Parameter(start) if bias else None

    def forward(self, z: Tensor) -> Tensor:
        """z [..., I] -> [..., N]."""
        return _exact(z, self.weight, self.bias)


class TwoPass(Token):
    """Logits W z + b of each token, from the last hidden states of the base model."""

    reads = "hidden"


class Sequence(Router):
    """Logits W z / |z|, with z the mean over a sequence. Rows of W start with norm 0.01: gates are near uniform.

    The released code flattens the sequence instead of taking its mean, which allows only one sequence length.
    """

    reads = "sequence"

    def __init__(self, width: int, n: int, *, std: float | None, generator: torch.Generator) -> None:
        super().__init__()
        rows = torch.empty(n, width).normal_(generator=generator)
        rows = 0.01 * F.normalize(rows, dim=1) if std is None else std * rows
        self.weight = nn.Parameter(rows)

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        """z [B, L, I] and mask [B, L] bool, True for the tokens of the mean -> [B, N]."""
        kept = wide(z).masked_fill(~mask.unsqueeze(-1), 0)
        mean = kept.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return _exact(F.normalize(mean, dim=-1, eps=1e-6), self.weight)


def _exact(z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """z Wᵀ + b in float32 or wider, also under autocast."""
    device = z.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return F.linear(wide(z), wide(weight), None if bias is None else wide(bias))
    return F.linear(wide(z), wide(weight), None if bias is None else wide(bias))


def _drawn(shape: tuple[int, ...], std: float | None, bound: float, generator: torch.Generator) -> Tensor:
    """A tensor from N(0, std²), or from U(±bound) if std is None."""
    empty = torch.empty(shape)
    if std is None:
        return empty.uniform_(-bound, bound, generator=generator) if bound else empty.zero_()
    return empty.normal_(0, std, generator=generator) if std else empty.zero_()


def _linear(shape: tuple[int, int], std: float | None, generator: torch.Generator) -> Tensor:
    return _drawn(shape, std, 1 / math.sqrt(shape[1]), generator)
