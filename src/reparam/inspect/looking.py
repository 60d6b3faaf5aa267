"""`reparam inspect` of a model that sees: what it is made of, and the attention of an answer as a picture.

The picture has two rows for each image: what each token of the answer attends to, and what each block does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from reparam.core.text import counted
from reparam.data.preview import printable
from reparam.evaluation.png import write_png
from reparam.vision.attention import Attention
from reparam.vision.files import Settings

PLOT = "attention.png"
SHADES = "viridis"
MOST = 6
"""Tokens, and blocks, that the picture shows."""


def lines(settings: Settings, tensors: dict[str, Tensor], *, depth: int | None) -> list[str]:
    """What a model that sees is made of, as lines. `depth` is the number of blocks of its language model."""
    vision, parameters = settings.vision, sum(tensor.numel() for tensor in tensors.values())
    of = "" if depth is None else f" of {depth}"
    return [
        f"blocks      the first {settings.blocks}{of} have learned to see; mask: {settings.mask}",
        f"images      {vision.size} x {vision.size} pixels, {vision.side} x {vision.side} patches of {vision.patch}: "
        f"{counted(vision.side**2, 'token')} each",
        f"embedding   {counted(parameters, 'parameter')}; "
        + ", ".join(f"|{name}| {norm:.4g}" for name, norm in norms(tensors).items()),
    ]


def norms(tensors: dict[str, Tensor]) -> dict[str, float]:
    """The Frobenius norms of the tensors of a patch embedding, by name."""
    return {name: float(tensor.float().norm()) for name, tensor in sorted(tensors.items())}


def as_json(settings: Settings, tensors: dict[str, Tensor], *, depth: int | None) -> dict[str, Any]:
    """The same as JSON values."""
    own = {"parameters": sum(tensor.numel() for tensor in tensors.values()), "norms": norms(tensors)}
    return {**dataclasses.asdict(settings), "blocks of the language model": depth, "embedding": own}


def attention_lines(seen: Attention) -> list[str]:
    """The answer, and how much of the attention of each of its tokens goes to the images."""
    shares = seen.shares.mean(0).tolist()
    told = ", ".join(f"{printable(token)!r} {share:.1%}" for token, share in zip(seen.tokens, shares, strict=True))
    by_block = ", ".join(f"{share:.1%}" for share in seen.shares.mean(1).tolist())
    return [
        f"answer      {printable(seen.answer)}",
        f"attention   to the image, mean over heads and blocks, by token: {told}",
        f"            by block: {by_block}",
    ]


def attention_json(seen: Attention) -> dict[str, Any]:
    """The same as JSON values, with the attention to each patch: images -> rows -> columns."""
    return {
        "answer": seen.answer,
        "tokens": list(seen.tokens),
        "share by token": seen.shares.mean(0).tolist(),
        "share by block": seen.shares.mean(1).tolist(),
        "patches": [found.mean((0, 1)).tolist() for found in seen.maps],
    }


def plot(seen: Attention, file: Path) -> None:
    """Draw the attention over the images."""
    blocks = len(seen.maps[0])
    shown = _spread(blocks)
    tokens = range(min(MOST, len(seen.tokens)))
    columns = 2 + max(len(tokens), len(shown))
    rows = 2 * len(seen.maps)
    figure = Figure(figsize=(0.6 + 1.6 * columns, 0.7 + 1.9 * rows), layout="constrained", dpi=120)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.axis("off")
    for number, (picture, found) in enumerate(zip(seen.pictures, seen.maps, strict=True)):
        above, below = panels[2 * number], panels[2 * number + 1]
        name = f"image {number}" if len(seen.maps) > 1 else "image"
        _picture(above[0], picture, name)
        _heat(above[1], picture, found.mean((0, 1)), "all tokens", found.mean((0, 1)).sum())
        for axes, token in zip(above[2:], tokens, strict=False):
            here = found[:, token].mean(0)
            _heat(axes, picture, here, _short(seen.tokens[token]), here.sum())
        for axes, block in zip(below[2:], shown, strict=False):
            here = found[block].mean(0)
            _heat(axes, picture, here, f"block {block}", here.sum())
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), SHADES)
    bar = figure.colorbar(scale, ax=panels, shrink=0.6, ticks=[0, 1], label="attention to a patch")
    bar.ax.set_yticklabels(["none", "the most\nof a panel"])
    figure.suptitle(f"answer: {_short(seen.answer, 70)}", fontsize=10)
    write_png(figure, file)


def _spread(blocks: int) -> list[int]:
    """Up to `MOST` numbers of blocks, from the first one to the last one."""
    return sorted({round(float(each)) for each in np.linspace(0, blocks - 1, min(MOST, blocks))})


def _picture(axes: Axes, picture: Tensor, title: str) -> None:
    shown = picture.permute(1, 2, 0).numpy()
    axes.imshow(shown if shown.shape[2] == 3 else shown[:, :, 0], cmap="gray", vmin=0, vmax=1)
    axes.set_title(title, fontsize=9)


def _heat(axes: Axes, picture: Tensor, found: Tensor, title: str, share: Tensor) -> None:
    """The picture in gray, and the attention to its patches over it, each patch a square of one color."""
    height, width = picture.shape[1:]
    gray = picture.mean(0).numpy()
    axes.imshow(gray, cmap="gray", vmin=0, vmax=1)
    scaled = found / found.max().clamp(min=torch.finfo(found.dtype).tiny)
    axes.imshow(scaled.numpy(), cmap=SHADES, vmin=0, vmax=1, alpha=0.75, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    axes.set_title(f"{title}\n{float(share):.0%}", fontsize=9)


def _short(text: str, longest: int = 14) -> str:
    shown = " ".join(printable(text).split()) or "␣"
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def check_images(images: Sequence[str], prompt: str | None, plot: Path | None) -> None:
    """Raise ValueError unless --image, --prompt and --plot are given together."""
    if prompt is not None and not images:
        raise ValueError("--prompt asks about an image; pass --image FILE")
    if images and prompt is None:
        raise ValueError('--image needs a question: pass --prompt "What is this?"')
    if images and plot is None:
        raise ValueError("--image makes a picture of the attention; pass --plot FOLDER, where it is written")
