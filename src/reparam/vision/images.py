"""The pixels of an image as the patch embedding takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from reparam.images.sources import Source, pillow, upright
from reparam.vision.patches import Vision

if TYPE_CHECKING:
    from PIL.Image import Image


def decoded(source: Source | Any, vision: Vision) -> Tensor:
    """The pixels [C, size, size] of an image as the model takes them: upright, resized, padded and normalized.

    `source` may also be a Pillow image, a path, bytes, or a tensor [C, H, W] in 0 ... 1, which keeps its size. Others
    are resized with their proportions, so that the longer side has `vision.size` pixels, and centered on the mean.

    Raises DataError, with the image's name, for a file that is missing, damaged, too large or in another format.
    """
    mean = torch.tensor(vision.mean).view(-1, 1, 1).expand(vision.channels, 1, 1)
    std = torch.tensor(vision.std).view(-1, 1, 1).expand(vision.channels, 1, 1)
    if isinstance(source, Tensor):
        vision.grid(source)
        return (source.float() - mean) / std
    image = upright(source, vision.channels)
    scale = vision.size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    resized = _pixels(image.resize((width, height), pillow().Resampling.BICUBIC))
    left, top = (vision.size - width) // 2, (vision.size - height) // 2
    normal = (resized - mean) / std
    return F.pad(normal, (left, vision.size - width - left, top, vision.size - height - top))


def _pixels(image: Image) -> Tensor:
    """The pixels [C, H, W] in 0 ... 1."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, -1).permute(2, 0, 1).float() / 255
