"""Where the tokens of images stand among those of the text, and the embeddings of both together.

Shapes: B rows, L tokens of a row, N images of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IGNORED = -100


def check_places(images: Tensor, counts: Sequence[int], labels: Tensor | None = None) -> None:
    """Check the numbers of images, [B, L] int64 (-1 for text), against the number of tokens of each image.

    Reading the rows in order, the tokens of image 0 must come first, in one piece, then those of image 1, and so on.
    Raises ValueError for other numbers of images or tokens, for an image in several pieces or rows, and if `labels`
    ask for the prediction of an image's token.

    >>> check_places(torch.tensor([[-1, 0, 0, -1], [1, 1, 1, -1]]), [2, 3])
    """
    places = torch.nonzero(images.flatten() >= 0).flatten().cpu()
    found = images.flatten().cpu()[places]
    distinct = found.unique().tolist()
    if len(distinct) != len(counts) or distinct != list(range(len(counts))):
        raise ValueError(
            f"the tokens have places for {len(distinct)} images, numbered {distinct[:5]}, and {len(counts)} images are "
            f"given; number them from 0 in the order of the rows"
        )
    for number, count in enumerate(counts):
        own = places[found == number]
        row, length = int(own[0]) // images.shape[1], len(own)
        if length != count:
            raise ValueError(f"image {number} has {count} tokens, and row {row} has {length} places for it")
        if int(own[-1]) - int(own[0]) != length - 1 or int(own[-1]) // images.shape[1] != row:
            raise ValueError(f"the places of image {number} in row {row} are in several pieces; give it one")
    if not torch.equal(found, found.sort().values):
        raise ValueError("the images do not come in the order of their places; number them in the order of the rows")
    if labels is not None and bool((labels[images >= 0] != IGNORED).any()):
        row = int(torch.nonzero(((labels != IGNORED) & (images >= 0)).any(1))[0])
        raise ValueError(
            f"row {row} has a label at the token of an image, which no language model predicts; set it to {IGNORED}"
        )


def placed(embeds: Tensor, images: Tensor, tokens: Sequence[Tensor]) -> Tensor:
    """The embeddings [B, L, hidden] with the tokens [n, hidden] of each image at its places."""
    where = (images >= 0).unsqueeze(-1)
    return embeds.masked_scatter(where, torch.cat(list(tokens)).to(embeds.dtype))


def positions_of(valid: Tensor) -> Tensor | None:
    """The positions [B, L] of tokens that are padded on the left; None if none are."""
    if bool(valid[:, 0].all()):
        return None
    return (valid.long().cumsum(1) - 1).clamp(min=0)
