"""From a router's logits to weights of the experts: pure functions.

    softmax    p = softmax(z / τ), and all experts are used
    sigmoid    p = σ(z) / Σ σ(z) (Polytropon); in training a sample of RelaxedBernoulli(z, τ) in the place of σ(z)
    top_k      p = softmax(z / τ), and the k largest are used, with weights by `gate`

`gate` for the chosen experts, and what reaches the router of the task's gradient:

    prob       p_i                        some
    renorm     p_i / Σ p over the chosen  some for k >= 2; with k = 1 the weight is the constant 1, which is refused
    ste        1, with the gradient of p  some
    one        1                          none: the router learns from auxiliary losses alone

Ties go to the expert with the lower number. Everything is computed in float32 or more. N experts, any leading shape.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reparam.core.dtypes import wide

SELECTS = ("softmax", "sigmoid", "top_k")
GATES = ("prob", "renorm", "ste", "one")
_EPS = 1e-12  # as in PEFT's Poly


class Gating(NamedTuple):
    """What a router decided, [..., N]."""

    logits: Tensor
    p: Tensor
    """Probabilities, or normalized sigmoids; they sum to 1."""
    weights: Tensor
    """What the experts' outputs are multiplied by; 0 where an expert is not used."""
    chosen: Tensor | None
    """Where an expert is used, bool; None where all are."""

    def detached(self) -> Gating:
        """The same, out of the graph."""
        return Gating(self.logits.detach(), self.p.detach(), self.weights.detach(), self.chosen)

    @property
    def counted(self) -> Tensor:
        """Where an expert counts as selected, bool: the chosen, or the most probable where all are used."""
        return most_probable(self.p, 1) if self.chosen is None else self.chosen


def choose(
    logits: Tensor,
    *,
    select: str = "softmax",
    temperature: float = 1.0,
    k: int = 1,
    gate: str = "prob",
    allowed: Tensor | None = None,
    sample: bool = False,
) -> Gating:
    """Probabilities and weights from logits [..., N].

    `allowed` [N] bool leaves experts out, and the others share their part in proportion. `sample` is for "sigmoid".
    """
    if select == "sigmoid":
        p = sigmoid_normalized(logits, temperature=temperature, allowed=allowed, sample=sample)
        return Gating(logits, p, p, None)
    p = softmax(logits, temperature=temperature, allowed=allowed)
    if select == "softmax":
        return Gating(logits, p, p, None)
    used = most_probable(p, k)
    if allowed is not None:
        used = used & allowed
    return Gating(logits, p, gated(p, used, gate), used)


def softmax(logits: Tensor, *, temperature: float = 1.0, allowed: Tensor | None = None) -> Tensor:
    """softmax(z / τ) over the experts that are allowed.

    >>> softmax(torch.zeros(4), allowed=torch.tensor([True, False, True, False])).tolist()
    [0.5, 0.0, 0.5, 0.0]
    """
    z = wide(logits)
    z = z if temperature == 1 else z / temperature
    return torch.softmax(z if allowed is None else z.masked_fill(~allowed, -torch.inf), -1)


def sigmoid_normalized(
    logits: Tensor, *, temperature: float = 1.0, allowed: Tensor | None = None, sample: bool = False
) -> Tensor:
    """σ(z) / Σ σ(z); with `sample`, σ((z + log u − log(1 − u)) / τ) for σ(z), with u uniform in (0, 1)."""
    z = wide(logits)
    if sample:
        u = torch.rand_like(z).clamp(torch.finfo(z.dtype).tiny, 1 - torch.finfo(z.dtype).eps)
        z = (z + torch.log(u) - torch.log1p(-u)) / temperature
    s = torch.sigmoid(z)
    s = s if allowed is None else s * allowed
    return s / (s.sum(-1, keepdim=True) + _EPS)


def most_probable(p: Tensor, k: int) -> Tensor:
    """Where the k largest are, bool [..., N]; of equal ones, those with the lower number."""
    order = p.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, True)


def gated(p: Tensor, used: Tensor, gate: str) -> Tensor:
    """The weights of the experts in `used`, by the table above; 0 elsewhere."""
    chosen = used.to(p.dtype)
    if gate == "one":
        return chosen
    kept = p * chosen
    if gate == "renorm":
        return kept / kept.sum(-1, keepdim=True)
    return kept if gate == "prob" else chosen + kept - kept.detach()
