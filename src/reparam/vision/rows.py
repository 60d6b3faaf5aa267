"""Rows with images: read, checked, and turned into examples of token ids and pixels.

A row has one of the formats of `data/formats`, and `image` or `images`: paths below the folder of its file, or base64.
In chats, images may also stand in the parts of a message. `<image>` in the text is the place of an image; without one,
images come first. A `text` is learned like a completion without a prompt, or after its image.

Shapes: T tokens of a row, with those of images; N images of a row.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from reparam.core.text import counted
from reparam.data.batches import IGNORED, Collator, Encoded
from reparam.data.formats import read_row
from reparam.data.row import Row
from reparam.data.rows import Reading
from reparam.errors import DataError
from reparam.vision.images import Source, check_header, decoded, source_of
from reparam.vision.patches import Vision
from reparam.vision.processor import MARK, expanded, placed_messages, with_places

KEYS = ("image", "images")


@dataclasses.dataclass(frozen=True)
class Images:
    """The images of a row, in the order of their places."""

    sources: tuple[Source, ...]
    digest: str
    """SHA-256 of their bytes."""


class ImageRows(Reading):
    """A stream of rows whose images are checked and kept in `found`, by the rows' places.

    Besides what `Reading` refuses, it raises DataError, at its end and with "file:line", for images that are missing,
    damaged, too large or outside of the folder of the data, and for rows with other numbers of places than images.
    """

    def __init__(
        self,
        sources: Sequence[str | Path],
        columns: Mapping[str, str] | None = None,
        *,
        found: MutableMapping[str, Images],
        **settings: Any,
    ) -> None:
        self._image_columns = {key: name for key, name in (columns or {}).items() if key in KEYS}
        self._others = {key: name for key, name in (columns or {}).items() if key not in KEYS}
        super().__init__(sources, self._others, **settings)
        self._found = found

    def row_of(self, value: Mapping[str, Any], place: str) -> Row:
        """The row, with a place for each image. Raises DataError as the class says."""
        given = {key: held for key, held in value.items() if key not in self._image_columns.values()}
        given |= {key: value[name] for key, name in self._image_columns.items() if name in value}
        named = [given.pop(key, None) for key in KEYS]
        if named[0] is not None and named[1] is not None:
            raise DataError([f'{place}: "image" and "images" are both given; keep one'])
        values = [named[0]] if named[0] is not None else named[1] or []
        if not isinstance(values, Sequence) or isinstance(values, str | bytes):
            raise DataError([f'{place}: "images" must be a list'])
        inner, given = _inside_messages(given)
        if inner and values:
            raise DataError([f"{place}: images stand in the messages and beside them; keep one"])
        row = _placed(read_row(given, place, self._others), len(inner or values), place)
        sources = tuple(source_of(each, place, _folder(place)) for each in inner or values)
        if sources:
            read = b"".join(hashlib.sha256(check_header(source)).digest() for source in sources)
            self._found[row.source] = Images(sources, hashlib.sha256(read).hexdigest())
        return row


def _folder(place: str) -> Path | None:
    """The folder of the file of a place ("file:line"); None if it is no file."""
    file = Path(place.rpartition(":")[0])
    return file.parent if file.is_file() else None


def _inside_messages(given: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The images that stand in parts of messages, and the row with places instead of these parts."""
    messages, found = given.get("messages"), []
    if not isinstance(messages, list):
        return [], given
    changed: list[Any] = []
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, list):
            changed.append(message)
            continue
        parts: list[Any] = []
        for part in content:
            if isinstance(part, Mapping) and part.get("type") in ("image", "image_url"):
                address = part.get("image_url")
                value = address.get("url") if isinstance(address, Mapping) else address
                value = value or next((part[key] for key in ("image", "path", "url", "base64") if part.get(key)), None)
                found += [value] if value is not None else []
                parts.append({"type": "text", "text": MARK})
            else:
                parts.append(part)
        changed.append({**message, "content": parts})
    return found, {**given, "messages": changed}


def _placed(row: Row, images: int, place: str) -> Row:
    """The row with a place for each image; a text becomes a completion."""
    if row.kind == "text":
        row = dataclasses.replace(row, kind="completion", prompt=MARK * images, completion=row.text, text="")
        if images and MARK in row.completion:
            raise DataError([f'{place}: "text" holds {MARK}, and its image comes first; leave it out'])
    answers = [m["content"] for m in row.messages if m["role"] == "assistant"] or [row.completion]
    if any(MARK in str(answer) for answer in answers):
        raise DataError([f"{place}: an answer holds {MARK}, which a model cannot say; leave it out"])
    try:
        if row.kind == "chat":
            return dataclasses.replace(row, messages=tuple(placed_messages(row.messages, images)))
        return dataclasses.replace(row, prompt=with_places(row.prompt, images, line=False))
    except ValueError as error:
        raise DataError([f"{place}: {error}"]) from None


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
