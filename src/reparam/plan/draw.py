"""A picture of the parts of the peak."""

from __future__ import annotations

from pathlib import Path

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
    left = 0.0
    for name in (n for n in COLORS if plan.peak.parts.get(n)):
        size = plan.peak.parts[name] / 2**30
        axes.barh(0, size, left=left, color=COLORS[name], edgecolor="white", label=f"{name}  {size:.2f} GiB")
        left += size
    if plan.limit is not None and plan.limit / 2**30 < 4 * left:
        axes.axvline(
            plan.limit / 2**30, color="black", linestyle="--", label=f"there are  {plan.limit / 2**30:.2f} GiB"
        )
    axes.set_yticks([])
    axes.set_xlabel("GiB at the peak of a step")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=4, frameon=False, fontsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
