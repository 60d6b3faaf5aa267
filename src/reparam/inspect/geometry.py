"""Measure how training changed the magnitudes and directions of a matrix (DoRA's paper, arXiv 2402.09353, §3.2).

    ΔM = mean over n of | ‖w'_n‖ - ‖w_n‖ |        ΔD = mean over n of 1 - cos(w'_n, w_n)

The vectors w_n are the rows of W [O, I], one per output feature (`axis="output"`, as in DoRA), or its columns, one per
input feature (`axis="input"`). The paper correlates ΔM with ΔD over sites and checkpoints: -0.62 for full fine-tuning,
which changes mostly one of the two; +0.83 for LoRA, which changes both together; -0.31 for DoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from reparam.core.base import Factors, Weight
from reparam.evaluation.png import write_png
from reparam.inspect.ranks import layer_of

Axis = Literal["output", "input"]
Blocks = Iterator[tuple[slice, Tensor, Tensor]]  # a slice of rows, and these rows of W and of W'


class Directions(NamedTuple):
    """Mean change of the magnitudes and of the directions of one matrix."""

    magnitude: float
    """ΔM, in the unit of W."""
    direction: float
    """ΔD, from 0 to 2."""


def geometry(before: Tensor, after: Tensor, *, axis: Axis = "output") -> Directions:
    """Compute ΔM and ΔD between two matrices [O, I].

    A vector that is zero in either matrix has no direction and counts for ΔM only.

    >>> geometry(torch.eye(2), 3 * torch.eye(2))
    Directions(magnitude=2.0, direction=0.0)
    """
    w, new = before.detach().double(), after.detach().double()
    return _measured(lambda: iter([(slice(None), w, new)]), axis)


@torch.no_grad()
def of_update(weight: Weight, factors: Factors, *, axis: Axis = "output") -> Directions:
    """Compute ΔM and ΔD of an update to its frozen matrix in any storage, a block of rows at a time."""

    def blocks() -> Blocks:
        for rows, block in weight.blocks():
            w = block.detach().double()
            yield rows, w, w + factors.change(w, rows)

    return _measured(blocks, axis)


def _measured(blocks: Callable[[], Blocks], axis: Axis) -> Directions:
    """Compute ΔM and ΔD in two passes over the blocks: first the norms, then the distances of the unit vectors."""
    dim = 1 if axis == "output" else 0

    def whole(parts: Iterable[Tensor]) -> Tensor:
        return torch.cat(list(parts)) if dim == 1 else torch.stack(list(parts)).sum(0)

    squares = [(w.square().sum(dim), new.square().sum(dim)) for _, w, new in blocks()]
    old_norm, new_norm = (whole(parts).sqrt() for parts in zip(*squares, strict=True))
    alive = (old_norm > 0) & (new_norm > 0)
    old, moved = (norm.where(alive, 1) for norm in (old_norm, new_norm))

    def distance(rows: slice, w: Tensor, new: Tensor) -> Tensor:
        units = (t / (norm[rows, None] if dim == 1 else norm) for t, norm in ((w, old), (new, moved)))
        return torch.sub(*units).square_().sum(dim)

    turned = (
        whole(distance(*block) for block in blocks())[alive] / 2
    )  # 1 - cos = ‖u' - u‖² / 2, computed without cancellation
    direction = float(turned.mean()) if len(turned) else 0.0
    return Directions(float((new_norm - old_norm).abs().mean()), direction)


def correlation(found: Sequence[Directions]) -> float:
    """Pearson correlation of ΔM and ΔD over the given measurements; NaN for fewer than two."""
    pairs = torch.tensor([(d.direction, d.magnitude) for d in found], dtype=torch.float64)
    return float(torch.corrcoef(pairs.t())[0, 1]) if len(pairs) > 1 else float("nan")


def plot(found: Mapping[str, Directions], file: Path) -> None:
    """Write a PNG of ΔM against ΔD with a point for each site; markers show the kind of site, shades its layer."""
    figure = Figure(figsize=(7, 4.5), layout="constrained", dpi=120)
    axes = figure.subplots()
    kinds: dict[str, list[tuple[float, float, int]]] = {}
    for path, moved in found.items():
        _, layer, kind = layer_of(path)
        kinds.setdefault(kind, []).append((moved.direction, moved.magnitude, -1 if layer is None else layer))
    highest = max(layer for points in kinds.values() for *_, layer in points)
    drawn = None
    for number, (kind, points) in enumerate(kinds.items()):
        x, y, layers = zip(*points, strict=True)
        marker = "osD^vP*X<>hpd"[number % 13]
        if max(layers) < 0:  # outside any layer
            axes.scatter(x, y, color="0.6", marker=marker, label=kind)
        else:
            drawn = axes.scatter(x, y, c=layers, cmap="viridis", vmin=0, vmax=highest or 1, marker=marker, label=kind)
    value = correlation(list(found.values()))
    axes.set(xlabel="ΔD, change of direction", ylabel="ΔM, change of magnitude", title=f"correlation {value:+.2f}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    if drawn is not None and highest > 0:
        figure.colorbar(drawn, ax=axes, label="layer")
    write_png(figure, file)
