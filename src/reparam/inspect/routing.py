"""How a mixture uses its experts on a file of rows: shares, entropy, and how alike the experts are, by router.

    load        each expert's share of the tokens that select it (the most probable one counts where all are used)
    weight      each expert's mean probability
    entropy     of the probabilities of a token, mean, over log N: 1 is undecided, 0 always certain
    redundancy  mean cosine of the changes of two experts, over pairs and sites of the router: 1 is N times one expert

Padding is left out. A router that gives every token the same weights counts once for each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from reparam.adapter.adapter import Adapter
from reparam.adapter.context import told
from reparam.core.base import ExpertChoice, Weight
from reparam.data.batches import Collator, Encoded, padding_id
from reparam.evaluation.png import write_png

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class RouterUse:
    """What one router did."""

    scope: str
    """Path of the module, layer or block; "model" for all of it."""
    load: tuple[float, ...]
    weight: tuple[float, ...]
    entropy: float
    redundancy: float | None
    """None for a single expert."""


@torch.no_grad()
def routing(
    adapter: Adapter, encoded: Encoded, tokenizer: PreTrainedTokenizerBase, *, batch: int = 16
) -> tuple[RouterUse, ...]:
    """Run the selected mixture over the examples and say what each of its routers did.

    Raises ValueError where the adapter is no mixture.
    """
    asked = {path: update.expert_choice() for path, update in adapter.updates.items()}
    sites = {path: site for path, site in asked.items() if site is not None}
    if not sites:
        raise ValueError(f"adapter {adapter.name!r} ({adapter.method.name}) is no mixture, so that nothing is routed")
    leaders = {path: site for path, site in sites.items() if site.leads}
    found = {path: _Counts(site.experts) for path, site in leaders.items()}
    hooks = [adapter.updates[path].register_forward_hook(_noting(found[path], site)) for path, site in leaders.items()]
    model = adapter.model
    device, training = next(model.parameters()).device, model.training
    collate = Collator(padding_id(tokenizer))
    model.eval()
    try:
        for start in range(0, len(encoded), batch):
            examples = collate([encoded[i] for i in range(start, min(start + batch, len(encoded)))])
            with told(model, examples):
                model(**{key: examples[key].to(device) for key in ("input_ids", "attention_mask")})
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return tuple(
        found[path].summary(leader.scope or "model", [site for site in sites.values() if site.scope == leader.scope])
        for path, leader in leaders.items()
    )


def plot(found: Sequence[RouterUse], file: Path) -> None:
    """Draw the experts' shares of the tokens by router, and beside them entropy and redundancy, as a PNG."""
    load = np.array([use.load for use in found])
    rows, n = load.shape
    figure = Figure(figsize=(7 + 0.35 * n, 1.8 + min(0.28 * rows, 10)), layout="constrained", dpi=120)
    shares, likeness = figure.subplots(1, 2, sharey=True, width_ratios=(2 + n, 6))
    image = shares.imshow(load, cmap="Blues", vmin=0, vmax=max(2 / n, load.max()), aspect="auto")
    shares.set_xticks(range(n))
    step = max(1, rows // 40)
    shares.set_yticks(range(0, rows, step), [use.scope for use in found[::step]])
    shares.set(xlabel="expert", title=f"share of tokens (even: {1 / n:.2f})")
    shares.spines[:].set_visible(False)
    shares.tick_params(length=0)
    figure.colorbar(image, ax=shares)
    likeness.plot([use.entropy for use in found], range(rows), "o", label="entropy (1: undecided)")
    if n > 1:
        likeness.plot([use.redundancy for use in found], range(rows), "x", label="redundancy (1: all alike)")
    likeness.set_xlim(min([0.0, *(use.redundancy or 0 for use in found)]) - 0.05, 1.05)
    likeness.grid(axis="x", alpha=0.3)
    likeness.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, fontsize=8)
    write_png(figure, file)


class _Counts:
    """Sums over tokens."""

    def __init__(self, n: int) -> None:
        self.used, self.p = torch.zeros(2, n, dtype=torch.float64)
        self.entropy = self.tokens = 0.0

    def add(self, used: Tensor, p: Tensor) -> None:
        """Of tokens [T, N]."""
        self.used += used.double().sum(0).cpu()
        self.p += p.double().sum(0).cpu()
        self.entropy += float(torch.special.entr(p.double()).sum())
        self.tokens += len(p)

    def summary(self, scope: str, sites: list[ExpertChoice]) -> RouterUse:
        """The shares."""
        n, tokens = len(self.p), max(self.tokens, 1.0)
        likeness = [_redundancy(site) for site in sites] if n > 1 else []
        return RouterUse(
            scope,
            tuple((self.used / self.used.sum().clamp(min=1)).tolist()),
            tuple((self.p / tokens).tolist()),
            self.entropy / tokens / math.log(n) if n > 1 else 0.0,
            sum(likeness) / len(likeness) if likeness else None,
        )


def _noting(counts: _Counts, site: ExpertChoice) -> Any:
    """A forward hook of a site's update that adds up what it decides for the valid tokens."""

    def note(update: nn.Module, args: tuple[Tensor, Weight], output: Tensor) -> None:
        decided = site.decided(args[0], args[1])
        if decided is not None:
            counts.add(*decided)

    return note


def _redundancy(site: ExpertChoice) -> float:
    """Mean cosine of two experts' changes."""
    inner = site.products()
    norms = inner.diagonal().clamp(min=1e-30).sqrt()
    cosines = inner / norms / norms[:, None]
    n = len(inner)
    return float((cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1)))
