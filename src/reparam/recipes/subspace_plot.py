"""Plot the metric over the number of dimensions as a PNG."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from reparam.evaluation.png import write_png
from reparam.recipes.subspace import Curve


def plot(curve: Curve, metric: str, file: Path) -> None:
    """Write a plot of the metric over d to `file`: mean and values of the maps, reference, threshold and d90."""
    figure = Figure(figsize=(7, 4), layout="constrained", dpi=120)
    axes = figure.subplots()
    good = [point for point in curve.points if None not in point.values]
    axes.plot([p.d for p in good], [p.mean for p in good], marker="o", label="mean over maps")
    pairs = [(p.d, value) for p in curve.points for value in p.values if value is not None]
    if len(pairs) > len(curve.points):
        axes.plot(*zip(*pairs, strict=True), linestyle="none", marker=".", alpha=0.5, label="one map")
    axes.axhline(curve.full, color="black", linewidth=1, label="full fine-tuning")
    axes.axhline(curve.threshold, color="black", linewidth=1, linestyle="--", label=f"{curve.share:g} of it")
    axes.axhline(curve.base, color="gray", linewidth=1, linestyle=":", label="without training")
    if curve.d90 is not None:
        axes.axvline(curve.d90, color="tab:red", linewidth=1, label=f"d90 = {curve.d90}")
    axes.set(xscale="log", xlabel="dimensions d", ylabel=metric)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    write_png(figure, file)
