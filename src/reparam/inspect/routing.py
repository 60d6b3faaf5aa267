"""Measure how each router of a mixture uses its N experts on a file of rows.

    load        share of the selections that go to each expert, sums to 1; where all experts are used, only the most
                probable one counts as selected
    weight      mean probability of each expert
    entropy     mean over tokens of the entropy of the probabilities, divided by log N; from 0 (always certain) to 1
                (undecided)
    redundancy  mean cosine similarity of the changes ΔW of two experts, over all pairs and all sites of the router;
                1 means that all experts are the same

Padding does not count. Every token counts once, also with a router that gives all tokens the same weights.
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
    """Statistics of one router over all tokens."""

    scope: str
    """Path of the module, layer or block that shares the router; "model" for the whole model."""
    load: tuple[float, ...]
    weight: tuple[float, ...]
    entropy: float
    redundancy: float | None
    """From -1 to 1; None for a single expert."""


@torch.no_grad()
def routing(
    adapter: Adapter, encoded: Encoded, tokenizer: PreTrainedTokenizerBase, *, batch: int = 16
) -> tuple[RouterUse, ...]:
    """Run the selected mixture on the examples, `batch` rows at a time, and return statistics of each router.

    Raises ValueError if the adapter is not a mixture.
    """
    asked = {path: update.expert_choice() for path, update in adapter.updates.items()}
    sites = {path: site for path, site in asked.items() if site is not None}
    if not sites:
        raise ValueError(
            f"adapter {adapter.name!r} ({adapter.method.name}) is not a mixture, so it has no routers to measure"
        )
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
    """Write a PNG with the load of each router's experts, and the entropy and redundancy of each router."""
    load = np.array([use.load for use in found])
    rows, n = load.shape
    figure = Figure(figsize=(7 + 0.35 * n, 1.8 + min(0.28 * rows, 10)), layout="constrained", dpi=120)
    shares, likeness = figure.subplots(1, 2, sharey=True, width_ratios=(2 + n, 6))
    image = shares.imshow(load, cmap="Blues", vmin=0, vmax=max(2 / n, load.max()), aspect="auto")
    shares.set_xticks(range(n))
    step = max(1, rows // 40)
    shares.set_yticks(range(0, rows, step), [use.scope for use in found[::step]])
    shares.set(xlabel="expert", title=f"load (equal shares: {1 / n:.2f})")
    shares.spines[:].set_visible(False)
    shares.tick_params(length=0)
    figure.colorbar(image, ax=shares)
    likeness.plot([use.entropy for use in found], range(rows), "o", label="entropy (1: undecided)")
    if n > 1:
        likeness.plot([use.redundancy for use in found], range(rows), "x", label="redundancy (1: all the same)")
    likeness.set_xlim(min([0.0, *(use.redundancy or 0 for use in found)]) - 0.05, 1.05)
    likeness.grid(axis="x", alpha=0.3)
    likeness.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, fontsize=8)
    write_png(figure, file)


class _Counts:
    """Sums over tokens of selections, probabilities and entropies of one router."""

    def __init__(self, n: int) -> None:
        self.used, self.p = torch.zeros(2, n, dtype=torch.float64)
        self.entropy = self.tokens = 0.0

    def add(self, used: Tensor, p: Tensor) -> None:
        """Add T tokens: `used` [T, N] marks the selected experts, `p` [T, N] has the probabilities."""
        self.used += used.double().sum(0).cpu()
        self.p += p.double().sum(0).cpu()
        self.entropy += float(torch.special.entr(p.double()).sum())
        self.tokens += len(p)

    def summary(self, scope: str, sites: list[ExpertChoice]) -> RouterUse:
        """Statistics of the router at `scope`, with the redundancy of its sites."""
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
    """A forward hook for a site's update that adds the router's decisions for all valid tokens to `counts`."""

    def note(update: nn.Module, args: tuple[Tensor, Weight], output: Tensor) -> None:
        decided = site.decided(args[0], args[1])
        if decided is not None:
            counts.add(*decided)

    return note


def _redundancy(site: ExpertChoice) -> float:
    """Mean cosine similarity of the changes ΔW of two different experts at a site."""
    inner = site.products()
    norms = inner.diagonal().clamp(min=1e-30).sqrt()
    cosines = inner / norms / norms[:, None]
    n = len(inner)
    return float((cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1)))
