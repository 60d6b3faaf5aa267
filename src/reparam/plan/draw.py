"""A picture of the parts of the peak."""

from __future__ import annotations

from pathlib import Path

from reparam.core.text import sized
from reparam.plan.estimate import Plan

COLORS = {  # distinct for color-blind readers (Okabe and Ito)
    "weights": "#0072B2",
    "adapter": "#E69F00",
    "gradients": "#CC79A7",
    "optimizer": "#009E73",
    "activations": "#56B4E9",
    "logits": "#D55E00",
    "unpacked matrix": "#F0E442",
}


def draw(plan: Plan, file: Path) -> None:
    """Write one horizontal bar, stacked by what the bytes are for, with the limit as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 2.4), layout="constrained")
    name_of_unit, unit = ("GiB", 2**30) if plan.peak.total >= 2**30 else ("MiB", 2**20)
    left = 0.0
    for name in (n for n in COLORS if plan.peak.parts.get(n)):
        size = plan.peak.parts[name]
        axes.barh(0, size / unit, left=left, color=COLORS[name], edgecolor="white", label=f"{name}  {sized(size)}")
        left += size / unit
    if plan.limit is not None and plan.limit / unit < 4 * left:
        axes.axvline(plan.limit / unit, color="black", linestyle="--", label=f"there are  {sized(plan.limit)}")
    axes.set_yticks([])
    axes.set_xlabel(f"{name_of_unit} at the peak of a step")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=4, frameon=False, fontsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
