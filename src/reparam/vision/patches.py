"""The embedding of images: a convolution over patches, a norm, learned positions, and a map to the model's width.

Shapes: C channels, H x W pixels, p side of a patch, h = H / p and w = W / p patches, D width of the embedding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.core.checks import finite, whole


@dataclasses.dataclass(frozen=True)
class Vision:
    """The settings of the patch embedding, and of the pixels that it takes. Raises ValueError for bad ones.

    >>> Vision(patch=14, size=448).side
    32
    """

    patch: int = 14
    """Side of a patch, in pixels."""
    size: int = 448
    """Side of the square image that the table of positions is for, in pixels; a multiple of `patch`."""
    width: int = 1536
    """Width D of the embedding before the map to the language model."""
    channels: int = 3
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of each channel, or of all, which is subtracted from pixels in 0 ... 1. By default CLIP's."""
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of each channel, or of all, by which they are divided."""

    def __post_init__(self) -> None:
        for name in ("patch", "size", "width", "channels"):
            if not whole(getattr(self, name), 1):
                raise ValueError(f"vision.{name}: {getattr(self, name)!r}: expected a whole number of at least 1")
        if self.size % self.patch:
            raise ValueError(f"vision.size: {self.size} is not a multiple of vision.patch, {self.patch}")
        for name in ("mean", "std"):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            right = all(finite(value) and (name == "mean" or value > 0) for value in values)
            if len(values) not in (1, self.channels) or not right:
                above = " above 0" if name == "std" else ""
                raise ValueError(f"vision.{name}: {values}: expected 1 or {self.channels} finite numbers{above}")

    @property
    def side(self) -> int:
        """Number of patches along a side of the image that the table of positions is for."""
        return self.size // self.patch

    def grid(self, pixels: Tensor, name: str = "the image") -> tuple[int, int]:
        """The patches (h, w) of an image [C, H, W]. Raises ValueError, with `name`, if it cannot be divided."""
        if pixels.ndim != 3 or pixels.shape[0] != self.channels:
            raise ValueError(
                f"{name} has the shape {list(pixels.shape)}; expected [{self.channels}, height, width] in pixels"
            )
        height, width = pixels.shape[1:]
        if height % self.patch or width % self.patch or not height or not width:
            raise ValueError(
                f"{name} has {height} x {width} pixels, and its sides are no multiples of the patch, {self.patch} "
                f"pixels; resize it (the processor does this)"
            )
        return height // self.patch, width // self.patch


class PatchEmbedding(nn.Module):
    """Embeds images of any size: Conv2d, RMSNorm, learned positions, and a linear map to the model's hidden size.

    The table of positions belongs to a grid of `vision.side` x `vision.side` patches. Other grids get it by bilinear
    interpolation in two dimensions.

    >>> embed = PatchEmbedding(Vision(patch=2, size=8, width=4, channels=1, mean=(0.5,), std=(0.5,)), hidden=6)
    >>> [list(tokens.shape) for tokens in embed([torch.zeros(1, 8, 8), torch.zeros(1, 4, 6)])]
    [[16, 6], [6, 6]]
    """

    def __init__(self, vision: Vision, hidden: int) -> None:
        super().__init__()
        self.vision = vision
        self.conv = nn.Conv2d(vision.channels, vision.width, vision.patch, stride=vision.patch)
        self.norm = nn.RMSNorm(vision.width, eps=1e-5)
        self.positions = nn.Parameter(torch.empty(1, vision.side**2, vision.width))
        self.out = nn.Linear(vision.width, hidden, bias=False)
        nn.init.normal_(self.positions, 0, 0.02)

    def forward(self, images: Sequence[Tensor]) -> list[Tensor]:
        """The tokens [h * w, hidden] of each image [C, H, W], row by row of patches.

        Raises ValueError if an image has another number of channels, or sides that are no multiples of the patch.
        """
        shapes: dict[torch.Size, list[int]] = {}
        for number, image in enumerate(images):
            self.vision.grid(image, f"image {number}")
            shapes.setdefault(image.shape, []).append(number)
        found: dict[int, Tensor] = {}
        weight = self.conv.weight
        for numbers in shapes.values():  # images of one shape at a time
            pixels = torch.stack([images[number] for number in numbers]).to(weight.device, weight.dtype)
            patches = self.conv(pixels)  # [n, D, h, w]
            tokens = self.norm(patches.flatten(2).transpose(1, 2)) + self.at(*patches.shape[2:])
            found |= dict(zip(numbers, self.out(tokens), strict=True))
        return [found[number] for number in range(len(images))]

    def at(self, height: int, width: int) -> Tensor:
        """The positions [1, h * w, D] of a grid of this many patches.

        Raises ValueError if they have to be interpolated and the table does not belong to a square grid.
        """
        count = self.positions.shape[1]
        side = math.isqrt(count)
        if side * side != count:
            raise ValueError(
                f"the table of positions has {count} rows, which is no square, so it cannot be interpolated to "
                f"{height} x {width} patches"
            )
        if (height, width) == (side, side):
            return self.positions
        table = self.positions.transpose(1, 2).unflatten(2, (side, side))
        resized = F.interpolate(table, size=(height, width), mode="bilinear", align_corners=False)
        return resized.flatten(2).transpose(1, 2)
