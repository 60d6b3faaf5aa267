"""Examples of token ids and pixels, from encoded rows with images.

Shapes: T tokens of a row, with those of images; N images of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from reparam.core.text import counted
from reparam.data.batches import IGNORED, Collator, Encoded
from reparam.errors import DataError
from reparam.images.rows import Images
from reparam.vision.images import decoded
from reparam.vision.patches import Vision
from reparam.vision.processor import expanded


class Seen(Dataset[dict[str, Any]]):
    """A map-style dataset of encoded rows with their images. `seen[i]` is a dict of

    input_ids [T], labels [T] (-100 at places of images), image_ids [T] (the number of the image in the row, -1 for
    text), row [] (the index i), all int64, and pixel_values, a list of N images [C, H, W], decoded when they are asked
    for.

    Raises DataError, with "file:line", for rows that are longer than `longest` with the tokens of their images, or cut
    so that an image is left out.
    """

    def __init__(
        self, encoded: Encoded, images: Mapping[str, Images], vision: Vision, *, mark: int, fill: int, longest: int
    ) -> None:
        self.encoded, self.images, self.vision, self.mark, self.fill = encoded, images, vision, mark, fill
        each = vision.side**2
        problems: list[str] = []
        self.counts = [int((encoded[i]["input_ids"] == mark).sum()) for i in range(len(encoded))]
        most: dict[str, int] = {}
        for number, count in enumerate(self.counts):
            source = encoded.sources[number]
            most[source] = max(most.get(source, 0), count)
            length = int(encoded.lengths[number]) + count * (each - 1)
            if length > longest:
                problems.append(
                    f"{source}: {length:,} tokens with {counted(each * count, 'token')} of its images, and at most "
                    f"{longest:,} are possible; shorten the row, raise data.max_length, or use smaller images"
                )
        for source, count in most.items():
            wanted = len(images[source].sources) if source in images else 0
            if count != wanted:
                problems.append(
                    f"{source}: {counted(count, 'place')} for {counted(wanted, 'image')} are left in its tokens; raise "
                    f"data.max_length, or use a chat template that writes all messages"
                )
        if problems:
            raise DataError(problems)

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.encoded[index]
        sources = self.images[self.encoded.sources[index]].sources[: self.counts[index]] if self.counts[index] else ()
        counts = [self.vision.side**2] * len(sources)
        tokens, places = expanded(example["input_ids"].tolist(), counts, self.mark, self.fill)
        image_ids = torch.tensor(places)
        labels = torch.full((len(tokens),), IGNORED)
        text = example["input_ids"] != self.mark
        labels[image_ids < 0] = example["labels"][text]
        return {
            "input_ids": torch.tensor(tokens),
            "labels": labels,
            "image_ids": image_ids,
            "row": example["row"],
            "pixel_values": [decoded(source, self.vision) for source in sources],
        }


def collator(fill: int) -> Any:
    """Makes batches of rows with images: padded on the right, images numbered through the batch."""
    padded = Collator(fill)

    def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = padded([{key: e[key] for key in ("input_ids", "labels", "row")} for e in examples])
        image_ids = torch.full(batch["input_ids"].shape, -1)
        pixels: list[Tensor] = []
        for number, example in enumerate(examples):
            own = example["image_ids"]
            image_ids[number, : len(own)] = torch.where(own >= 0, own + len(pixels), own)
            pixels += example["pixel_values"]
        return {**batch, "image_ids": image_ids, "pixel_values": pixels}

    return collate
