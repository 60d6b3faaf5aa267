"""Show the rank of each site as a map with layers as rows and kinds of sites as columns, as a terminal table or a PNG.

The first number in a path is the layer: `model.layers.3.self_attn.q_proj` is layer 3, kind `self_attn.q_proj`. In a
model with several stacks of layers (`encoder.`, `decoder.`), the kind begins with the stack.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from reparam.evaluation.png import write_png

MAP = "Blues"
_READABLE = 40  # maximum number of rows for which the PNG shows the rank in each cell


class RankMap(NamedTuple):
    """Ranks by layer and kind of site."""

    layers: tuple[int | None, ...]
    """Layers in ascending order; a final None stands for sites outside of any layer."""
    kinds: tuple[str, ...]
    """Kinds in the order of the sites."""
    ranks: Mapping[tuple[int | None, str], int]
    """Rank by (layer, kind), for the sites that exist."""

    @property
    def highest(self) -> int:
        """The largest rank, at least 1."""
        return max(1, *self.ranks.values())


def rank_map(ranks: Mapping[str, int]) -> RankMap:
    """Arrange ranks, given by the path of their site, by layer and kind.

    >>> found = rank_map({"layers.0.q": 2, "layers.0.up": 0, "layers.1.q": 5, "head": 1})
    >>> found.layers, found.kinds, found.ranks[1, "q"]
    ((0, 1, None), ('q', 'up', 'head'), 5)
    """
    stacks = {stack for stack, layer, _ in map(layer_of, ranks) if layer is not None}
    cells: dict[tuple[int | None, str], int] = {}
    for path, rank in ranks.items():
        stack, layer, kind = layer_of(path)
        cells[layer, f"{stack}.{kind}" if layer is not None and len(stacks) > 1 else kind] = rank
    layers = sorted({layer for layer, _ in cells if layer is not None})
    outside = (None,) if any(layer is None for layer, _ in cells) else ()
    return RankMap((*layers, *outside), tuple(dict.fromkeys(kind for _, kind in cells)), cells)


def layer_of(path: str) -> tuple[str, int | None, str]:
    """Split the path of a site into the stack of layers, the layer's number and the kind of site.

    A site outside of any layer gives ("", None, path).
    """
    parts = path.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None or at == len(parts) - 1:
        return "", None, path
    return ".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :])


def short(kinds: tuple[str, ...]) -> list[str]:
    """Shorten kinds to their last parts, as few as keep the names distinct."""
    for count in range(1, 1 + max(kind.count(".") + 1 for kind in kinds)):
        names = [".".join(kind.split(".")[-count:]) for kind in kinds]
        if len(set(names)) == len(names):
            return names
    return list(kinds)


def table(found: RankMap) -> Table:
    """Terminal table of the map, with the sum of each layer; the shade of a cell grows with the root of its rank."""
    shown = Table(title="rank by layer and kind of site", title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("layer", justify="right")
    for name in short(found.kinds):
        shown.add_column(name, justify="right", overflow="fold")
    shown.add_column("sum", justify="right")
    for layer in found.layers:
        here = [found.ranks.get((layer, kind)) for kind in found.kinds]
        cells = [_cell(rank, found.highest) for rank in here]
        shown.add_row("-" if layer is None else str(layer), *cells, str(sum(rank or 0 for rank in here)))
    return shown


def _cell(rank: int | None, highest: int) -> Text:
    if rank is None:
        return Text("")
    red, green, blue, _ = (round(255 * part) for part in matplotlib.colormaps[MAP](math.sqrt(rank / highest)))
    ink = "black" if red + green + blue > 384 else "white"
    return Text(f"{rank:>4}", style=f"{ink} on rgb({red},{green},{blue})")


def plot(found: RankMap, file: Path) -> None:
    """Write the map as a PNG."""
    grid = np.array([[found.ranks.get((layer, kind), np.nan) for kind in found.kinds] for layer in found.layers])
    rows, columns = grid.shape
    figure = Figure(figsize=(2 + 0.8 * columns, 1.8 + min(0.28 * rows, 10)), layout="constrained", dpi=120)
    axes = figure.subplots()
    shades = matplotlib.colormaps[MAP].with_extremes(bad="0.85")  # gray where no site exists
    image = axes.imshow(grid, cmap=shades, norm=PowerNorm(0.5, vmin=0, vmax=found.highest), aspect="auto")
    axes.set_xticks(range(columns), short(found.kinds), rotation=45, ha="right")
    step = max(1, rows // 20)
    axes.set_yticks(range(0, rows, step), ["-" if layer is None else str(layer) for layer in found.layers[::step]])
    axes.set(ylabel="layer", title="rank of each site")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if rows <= _READABLE:
        for (row, column), rank in np.ndenumerate(grid):
            if not np.isnan(rank):
                ink = "white" if rank > 0.36 * found.highest else "black"
                axes.text(column, row, f"{rank:.0f}", ha="center", va="center", color=ink, fontsize=8)
    figure.colorbar(image, ax=axes, label="rank")
    write_png(figure, file)
