"""PNG plots of the results of `deep.py`: spectra, amplification, survival, and similarity of two adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reparam.adapter.fold import SiteMerge
from reparam.evaluation.png import write_png
from reparam.inspect.amplification import Amplification
from reparam.inspect.ranks import layer_of, rank_map, short
from reparam.inspect.similarity import Similarity
from reparam.inspect.spectrum import Spectrum

SHADES = "viridis"
_COLUMNS = 4


def spectra(found: Mapping[str, Spectrum], file: Path) -> None:
    """Plot the singular values of each site, with a panel for each kind of site and a line for each layer."""
    groups: dict[str, list[tuple[int, Spectrum]]] = {}
    for path, seen in found.items():
        _, layer, kind = layer_of(path)
        groups.setdefault(kind, []).append((-1 if layer is None else layer, seen))
    highest = max(layer for lines in groups.values() for layer, _ in lines)
    columns = min(_COLUMNS, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure = Figure(figsize=(1.2 + 2.6 * columns, 0.8 + 2.2 * rows), layout="constrained", dpi=120)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    shades = matplotlib.colormaps[SHADES]
    for axes, (name, lines) in zip(panels.flat, zip(short(tuple(groups)), groups.values(), strict=True), strict=False):
        for layer, seen in lines:
            color = "0.5" if layer < 0 else shades(0.9 * layer / max(1, highest))
            values = seen.values[: seen.rank]
            axes.plot(range(1, 1 + len(values)), values, color=color, marker=".", linewidth=1)
        axes.set_title(name, fontsize=9)
        _plain(axes)
    for axes in panels.flat[len(groups) :]:
        axes.set_visible(False)
    for axes in panels.flat[max(0, len(groups) - columns) : len(groups)]:  # panels without another panel below
        axes.tick_params(labelbottom=True)
    panels.flat[0].set_yscale("log")
    panels.flat[0].xaxis.get_major_locator().set_params(integer=True)
    kinds = {seen.kind for seen in found.values()}
    of = {"all": "ΔW", "leading": "ΔW (leading)", "low-rank part": "s B A"}[kinds.pop() if len(kinds) == 1 else "all"]
    figure.supxlabel("index of the singular value", fontsize=10)
    figure.supylabel(f"singular value of {of}", fontsize=10)
    if highest > 0:
        scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, highest / 0.9), SHADES)
        bar = figure.colorbar(scale, ax=panels, label="layer", boundaries=np.linspace(0, highest, 100))
        bar.set_ticks(sorted({round(highest * part / 5) for part in range(6)}))
    write_png(figure, file)


def amplification(found: Mapping[str, Amplification], file: Path) -> None:
    """Plot the norm of W in ΔW's, W's and random directions, and |ΔW|, with a column for each kind of site."""
    names = list(dict.fromkeys(layer_of(path)[2] for path in found))
    figure = Figure(figsize=(2.5 + 0.9 * len(names), 4.5), layout="constrained", dpi=120)
    axes = figure.subplots()
    series = {
        "top": ("W in W's leading directions", "0.3", "^"),
        "change": ("|ΔW|", "tab:red", "D"),
        "own": ("W in ΔW's directions", "tab:blue", "o"),
        "random": ("W in random directions", "0.7", "x"),
    }
    for number, (key, (label, color, marker)) in enumerate(series.items()):
        beside = 0.15 * (number - 1.5)
        points = [(names.index(layer_of(path)[2]) + beside, getattr(seen, key)) for path, seen in found.items()]
        x, y = zip(*points, strict=True)
        axes.scatter(x, y, color=color, marker=marker, label=label, s=22, alpha=0.7)
    axes.set_yscale("log")
    axes.set_xticks(range(len(names)), short(tuple(names)), rotation=45, ha="right")
    factors = [seen.factor for seen in found.values() if seen.factor is not None]
    axes.set(ylabel="Frobenius norm", title=f"amplification: median {np.median(factors):.3g}" if factors else "")
    _plain(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    write_png(figure, file)


def survival(sites: Sequence[Mapping[str, SiteMerge]], total: Mapping[str, float], file: Path) -> None:
    """Plot the share of ΔW that a merge into each storage would keep: a point for each site, a bar for all sites."""
    kinds = list(total)
    figure = Figure(figsize=(7, 1.2 + 0.5 * len(kinds)), layout="constrained", dpi=120)
    axes = figure.subplots()
    for y, kind in enumerate(kinds):
        here = [site[kind].survival for site in sites if kind in site]
        spread = np.linspace(-0.22, 0.22, len(here))
        axes.barh(y, total[kind], height=0.7, color="tab:blue", alpha=0.25)
        axes.scatter(here, y + spread, s=8, color="tab:blue")
        axes.annotate(f"{total[kind]:.4f}", (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.invert_yaxis()
    axes.axvline(1, color="0.4", linewidth=0.8)
    axes.set(xlabel="share of ΔW that a merge would keep; bar and number: all sites")
    _plain(axes)
    write_png(figure, file)


def similarity(found: Mapping[str, Similarity], file: Path) -> None:
    """Plot the mean of φ(i, j) over sites for left and for right directions, and φ of all right directions by site."""
    size = [min(alike.left.shape[dim] for alike in found.values()) for dim in (0, 1)]
    figure = Figure(figsize=(12, 4.2), layout="constrained", dpi=120)
    left, right, sites = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
    for axes, side in ((right, "right"), (left, "left")):
        grids = [getattr(alike, side)[: size[0], : size[1]].numpy() for alike in found.values()]
        image = axes.imshow(np.mean(grids, 0), cmap=SHADES, vmin=0, vmax=1, origin="lower", aspect="equal")
        does = "reads (right)" if side == "right" else "writes (left)"
        axes.set(title=f"φ(i, j), directions that ΔW {does}", xlabel="j, other adapter", ylabel="i, this adapter")
        for axis, count in ((axes.xaxis, size[1]), (axes.yaxis, size[0])):
            step = max(1, count // 8)
            axis.set_ticks(range(0, count, step), [str(n + 1) for n in range(0, count, step)])
        axes.title.set_fontsize(10)
    figure.colorbar(image, ax=(left, right), label="mean over sites")
    _by_site({name: alike.whole[1] for name, alike in found.items()}, sites, figure)
    write_png(figure, file)


def _by_site(values: Mapping[str, float], axes: Axes, figure: Figure) -> None:
    """Draw a heat map of the values: a row for each layer, a column for each kind of site."""
    cells = rank_map({name: number for number, name in enumerate(values)})
    known = list(values.values())
    grid = np.array(
        [
            [known[at] if (at := cells.ranks.get((layer, kind))) is not None else np.nan for kind in cells.kinds]
            for layer in cells.layers
        ]
    )
    image = axes.imshow(grid, cmap="Blues", vmin=0, aspect="auto")
    axes.set_xticks(range(len(cells.kinds)), short(cells.kinds), rotation=45, ha="right", fontsize=8)
    step = max(1, len(cells.layers) // 16)
    axes.set_yticks(
        range(0, len(cells.layers), step), ["-" if layer is None else str(layer) for layer in cells.layers[::step]]
    )
    axes.set(ylabel="layer", title="φ of all right directions, by site")
    axes.title.set_fontsize(10)
    figure.colorbar(image, ax=axes)


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
