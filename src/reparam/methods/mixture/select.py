"""Weights of the experts from a router's logits z: pure functions.

    softmax    p = softmax(z / τ), and all experts are used
    sigmoid    p = σ(z) / Σ σ(z) (Polytropon); in training, a sample of RelaxedBernoulli(z, τ) replaces σ(z)
    top_k      p = softmax(z / τ), and the k largest are used, with weights by `gate`

`gate` sets the weights of the experts that top_k selects:

    gate       weight                       does the task's loss train the router?
    prob       p_i                          yes
    renorm     p_i / Σ p of the selected    yes for k >= 2; k = 1 is refused, because the weight is the constant 1
    ste        1, with the gradient of p    yes
    one        1                            no, only auxiliary losses do

Of equal probabilities, the expert with the lower number is selected. All values are computed in float32 or wider.
Shapes are [..., N] for N experts.
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
    """The result of a router and a selection; all tensors are [..., N]."""

    logits: Tensor
    p: Tensor
    """Probabilities, or normalized sigmoids; they sum to 1."""
    weights: Tensor
    """Factors of the experts' outputs; 0 for an expert that is not used."""
    chosen: Tensor | None
    """True for the experts that are used, bool; None if all are used."""

    def detached(self) -> Gating:
        """The same values, detached from the graph."""
        return Gating(self.logits.detach(), self.p.detach(), self.weights.detach(), self.chosen)

    @property
    def counted(self) -> Tensor:
        """True for experts that count as selected, bool: the used ones, or the most probable one if all are used."""
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

    `allowed` [N] is False for experts that must not be used; the others share their weight in proportion. `sample`
    draws a random sample, and only applies to select="sigmoid".
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
    """softmax(z / τ) [..., N] over the allowed experts.

    >>> softmax(torch.zeros(4), allowed=torch.tensor([True, False, True, False])).tolist()
    [0.5, 0.0, 0.5, 0.0]
    """
    z = wide(logits)
    z = z if temperature == 1 else z / temperature
    return torch.softmax(z if allowed is None else z.masked_fill(~allowed, -torch.inf), -1)


def sigmoid_normalized(
    logits: Tensor, *, temperature: float = 1.0, allowed: Tensor | None = None, sample: bool = False
) -> Tensor:
    """σ(z) / Σ σ(z); with `sample`, σ((z + log u − log(1 − u)) / τ) replaces σ(z), with u uniform in (0, 1)."""
    z = wide(logits)
    if sample:
        u = torch.rand_like(z).clamp(torch.finfo(z.dtype).tiny, 1 - torch.finfo(z.dtype).eps)
        z = (z + torch.log(u) - torch.log1p(-u)) / temperature
    s = torch.sigmoid(z)
    s = s if allowed is None else s * allowed
    return s / (s.sum(-1, keepdim=True) + _EPS)


def most_probable(p: Tensor, k: int) -> Tensor:
    """A mask of the k largest probabilities, bool [..., N]; of equal ones, those with the lower number."""
    order = p.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, True)


def gated(p: Tensor, used: Tensor, gate: str) -> Tensor:
    """The weights [..., N] of the experts in `used`, by the table above; 0 for the others."""
    chosen = used.to(p.dtype)
    if gate == "one":
        return chosen
    kept = p * chosen
    if gate == "renorm":
        return kept / kept.sum(-1, keepdim=True)
    return kept if gate == "prob" else chosen + kept - kept.detach()
