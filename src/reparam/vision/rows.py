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
from reparam.data.lengths import TooLong
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

    A row is too long if it has more than `longest` tokens with those of its images, and tokens with loss lie beyond.
    `too_long` says what becomes of it: "auto" and "error" refuse it, "drop" leaves it out, and "truncate" cuts it at
    its end, or leaves it out if no loss or only a part of an image is left there.

    Raises DataError, with "file:line", for rows that are too long, and for rows in which a template left out an image.
    """

    def __init__(
        self,
        encoded: Encoded,
        images: Mapping[str, Images],
        vision: Vision,
        *,
        mark: int,
        fill: int,
        longest: int,
        too_long: TooLong = "auto",
    ) -> None:
        self.encoded, self.images, self.vision, self.mark, self.fill = encoded, images, vision, mark, fill
        self.longest = longest
        each = vision.side**2
        problems: list[str] = []
        places = [int((encoded[i]["input_ids"] == mark).sum()) for i in range(len(encoded))]
        most: dict[str, int] = {}
        self.sizes: list[int] = []
        """The number of tokens of each example of `encoded`, with those of its images."""
        self.kept: list[int] = []
        """The examples that are not left out, by their index in `encoded`."""
        self.cut: list[str] = []
        """The rows that lost tokens with loss."""
        self.left_out: list[str] = []
        """The rows that are left out, because they are too long."""
        for number, count in enumerate(places):
            source = encoded.sources[number]
            most[source] = max(most.get(source, 0), count)
            length = int(encoded.lengths[number]) + count * (each - 1)
            self.sizes.append(length)
            loss = self._labels(number) if length > longest else torch.empty(0)
            if bool((loss[longest:] != IGNORED).any()):
                if too_long not in ("drop", "truncate"):
                    problems.append(
                        f"{source}: {length:,} tokens with {counted(each * count, 'token')} of its images, and at "
                        f"most {longest:,} are possible; shorten the row, raise data.max_length, use smaller images, "
                        f"or set data.too_long to drop or truncate"
                    )
                elif too_long == "drop" or not bool((loss[:longest] != IGNORED).any()):
                    self.left_out.append(source)
                    continue
                else:
                    self.cut.append(source)
            self.kept.append(number)
        shortened = {*self.cut, *self.left_out} | ({*most} if too_long == "truncate" else set())
        for source, count in most.items():
            wanted = len(images[source].sources) if source in images else 0
            if count != wanted and source not in shortened:
                problems.append(
                    f"{source}: {counted(count, 'place')} for {counted(wanted, 'image')} are left in its tokens; raise "
                    f"data.max_length, or use a chat template that writes all messages"
                )
        if not problems and not self.kept:
            problems.append(f"all {counted(len(encoded), 'row')} are too long for {longest:,} tokens; raise max_length")
        if problems:
            raise DataError(problems)
        self.counts = [places[n] if self.sizes[n] <= longest else self._whole(n) for n in self.kept]
        """The number of images of each example."""

    @property
    def sources(self) -> list[str]:
        """Where each example comes from, as "file:line"."""
        return [self.encoded.sources[number] for number in self.kept]

    @property
    def lengths(self) -> Tensor:
        """The number of tokens of each example, with those of its images, before it is cut; [E] int64."""
        return torch.tensor([self.sizes[number] for number in self.kept])

    def _expanded(self, number: int) -> tuple[list[int], Tensor]:
        """All tokens of an example of `encoded`, and the numbers of their images."""
        ids = self.encoded[number]["input_ids"].tolist()
        tokens, places = expanded(ids, [self.vision.side**2] * ids.count(self.mark), self.mark, self.fill)
        return tokens, torch.tensor(places)

    def _labels(self, number: int) -> Tensor:
        example = self.encoded[number]
        places = self._expanded(number)[1]
        labels = torch.full((len(places),), IGNORED)
        labels[places < 0] = example["labels"][example["input_ids"] != self.mark]
        return labels

    def _whole(self, number: int) -> int:
        """How many images of an example of `encoded` are whole before the place where it is cut."""
        places = self._expanded(number)[1][: self.longest]
        return int((places >= 0).sum()) // self.vision.side**2

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, count = self.kept[index], self.counts[index]
        tokens, places = self._expanded(number)
        end = min(len(tokens), self.longest)
        if bool((places[:end] >= count).any()):  # a part of an image, after which no loss follows
            end = int(torch.nonzero(places >= count)[0])
        sources = self.images[self.encoded.sources[number]].sources[:count] if count else ()
        return {
            "input_ids": torch.tensor(tokens[:end]),
            "labels": self._labels(number)[:end],
            "image_ids": places[:end],
            "row": torch.tensor(index),
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
