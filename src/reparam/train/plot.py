"""Plot the loss curves of a run as a PNG file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reparam.evaluation.png import write_png


def plot_losses(history: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Plot training and held-out loss (nats per token) over optimizer steps, from a Trainer's log history."""
    figure = Figure(figsize=(7, 4), dpi=120)
    figure.subplots_adjust(left=0.1, right=0.98, bottom=0.13, top=0.97)
    axes = figure.subplots()
    for key, label, style in (("loss", "training", {"alpha": 0.7}), ("eval_loss", "held out", {"marker": "o"})):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **({"marker": "o"} if len(points) == 1 else {}) | style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    write_png(figure, file)
