"""Routers: from what they may look at to logits of N experts. What becomes of the logits is `select.py`'s.

    static           nothing: the logits are parameters                      logits [N]
    task_embedding   the task: W e_t (MOELoRA, Liu et al. 2023, §4)          [N], or [B, N] for a task per row
    task_logits      the task: a row of logits for each (Polytropon)         the same
    token            each token's vector: W z + b                            [..., N]
    two_pass         the last hidden state of each token in a forward of the base (X-LoRA): W z + b       [B, L, N]
    sequence         the mean of a sequence's vectors, of length 1 (MoLE)    [B, N]

Everything is computed in float32 or more, under autocast too. I is the width of what is read, T the number of tasks.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.core.dtypes import wide

Reads = Literal["nothing", "tasks", "token", "sequence", "hidden"]


class Router(nn.Module):
    """What all routers have: what they read."""

    reads: ClassVar[Reads]


class Static(Router):
    """N logits, at first 0."""

    reads = "nothing"

    def __init__(self, n: int, *, std: float | None, generator: torch.Generator) -> None:
        super().__init__()
        self.logits = nn.Parameter(_drawn((n,), std, 0.0, generator))

    def forward(self) -> Tensor:
        """[N]."""
        return self.logits


class TaskEmbedding(Router):
    """W e_t with an embedding of N(0, 1) for each task, and W as `nn.Linear` draws it."""

    reads = "tasks"

    def __init__(self, tasks: int, n: int, width: int, *, std: float | None, generator: torch.Generator) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(tasks, width).normal_(generator=generator))
        self.weight = nn.Parameter(_linear((n, width), std, generator))

    def forward(self, tasks: Tensor) -> Tensor:
        """Task numbers [...] -> [..., N]."""
        return _exact(F.embedding(tasks, self.embedding), self.weight)


class TaskLogits(Router):
    """A row of logits for each task, drawn from U(±1e-3)."""

    reads = "tasks"

    def __init__(self, tasks: int, n: int, *, std: float | None, generator: torch.Generator) -> None:
        super().__init__()
        self.logits = nn.Parameter(_drawn((tasks, n), std, 1e-3, generator))

    def forward(self, tasks: Tensor) -> Tensor:
        """Task numbers [...] -> [..., N]."""
        return F.embedding(tasks, self.logits)


class Token(Router):
    """W z + b of each token, W and b as `nn.Linear` draws them."""

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
    """W z + b of the base's last hidden states."""

    reads = "hidden"


class Sequence(Router):
    """W z / |z| of the mean z of a sequence; rows of W have length 0.01 at first, so that gates start near uniform.

    The release flattens the sequence instead of taking its mean, which fixes its length.
    """

    reads = "sequence"

    def __init__(self, width: int, n: int, *, std: float | None, generator: torch.Generator) -> None:
        super().__init__()
        rows = torch.empty(n, width).normal_(generator=generator)
        rows = 0.01 * F.normalize(rows, dim=1) if std is None else std * rows
        self.weight = nn.Parameter(rows)

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        """z [B, L, I] and which of its positions count, mask [B, L] bool -> [B, N]."""
        kept = wide(z).masked_fill(~mask.unsqueeze(-1), 0)
        mean = kept.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return _exact(F.normalize(mean, dim=-1, eps=1e-6), self.weight)


def _exact(z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """z Wᵀ + b in float32 or more, under autocast too."""
    device = z.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return F.linear(wide(z), wide(weight), None if bias is None else wide(bias))
    return F.linear(wide(z), wide(weight), None if bias is None else wide(bias))


def _drawn(shape: tuple[int, ...], std: float | None, bound: float, generator: torch.Generator) -> Tensor:
    """N(0, std²), or U(±bound) without a std."""
    empty = torch.empty(shape)
    if std is None:
        return empty.uniform_(-bound, bound, generator=generator) if bound else empty.zero_()
    return empty.normal_(0, std, generator=generator) if std else empty.zero_()


def _linear(shape: tuple[int, int], std: float | None, generator: torch.Generator) -> Tensor:
    return _drawn(shape, std, 1 / math.sqrt(shape[1]), generator)
