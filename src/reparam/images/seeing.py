"""What a vision-language model gets for rows with images, through its own processor.

The tokens of a row are those of the processor: its text is that of the chat template, in which each image is written as
the processor writes it. How it writes an image depends on the image's size alone, so rows are encoded without decoding
their images; these are decoded when a batch is made.

Shapes: B rows of a batch, T tokens.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoConfig

from reparam.core.text import counted
from reparam.data.batches import Collator, Encoded, padding_id
from reparam.data.offsets import with_offsets
from reparam.data.placing import Placed
from reparam.data.row import Row
from reparam.errors import BaseError, DataError
from reparam.hf.processors import load_processor, sees
from reparam.images.places import MARK
from reparam.images.rows import Images
from reparam.images.sources import Source, pillow, size_of, upright

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TYPES = ("token_type_ids", "mm_token_type_ids")
"""The names under which models take which tokens are of images, [B, T]."""


class Seeing:
    """The processor of a vision-language model, and the images of rows.

    Args:
        processor: the processor of transformers.
        found: the images of each row, by its place.
        vision: the ids of the tokens that begin and end an image in the model's configuration, if it has such.

    Raises BaseError if the processor does not tell how it writes an image.
    """

    mark = MARK

    def __init__(self, processor: Any, found: MutableMapping[str, Images], *, config: Any = None) -> None:
        self.processor, self.found = processor, found
        self.tokenizer: PreTrainedTokenizerBase = processor.tokenizer
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(padding_id(self.tokenizer))
        token = getattr(processor, "image_token", None)
        if not isinstance(token, str):
            raise BaseError(f"{type(processor).__name__} does not tell which text stands for an image")
        self.token = token
        ends = [getattr(config, f"vision_{end}_token_id", None) for end in ("start", "end")]
        start, end = (self.tokenizer.convert_ids_to_tokens(i) if isinstance(i, int) else "" for i in ends)
        self._raw = f"{start or ''}{token}{end or ''}"
        self.ids = torch.tensor([i for i in processor.image_token_ids if i is not None])
        """The ids of the tokens that stand for images."""
        given = processor(text=[token], images=[[self._blank((32, 32))]], return_tensors="pt")
        self._types = next((name for name in TYPES if name in given), None)
        self._text = {"input_ids", "attention_mask", *TYPES}
        self.written_for = functools.cache(self._written_for)

    # --- as `data.placing.Placing`

    def written(self, text: str) -> str:
        """The text with what the model writes for an image at each mark."""
        return text.replace(MARK, self._raw)

    def located(self, row: Row, text: str) -> Placed:
        """The tokens of a text of a row, in which each image is written as the processor writes it.

        Raises ValueError if the text has more images than the row, and DataError for a damaged image.
        """
        sources = self.found[row.source].sources if row.source in self.found else ()
        return self.placed(text, sources)

    def placed(self, text: str, sources: Sequence[Any]) -> Placed:
        """The tokens of a text with these images, of which the last ones may be missing. Raises as `located` does."""
        pieces = text.split(self.token)
        count = len(pieces) - 1
        if count > len(sources):
            raise ValueError(
                f"the text has {counted(count, 'place')} {self.token} for {counted(len(sources), 'image')}; that text "
                f"stands for an image, so leave it out elsewhere"
            )
        written = [self.written_for(size_of(source)) for source in sources[:count]]
        long, places, at = pieces[0], [], len(pieces[0])
        for piece, image in zip(pieces[1:], written, strict=True):
            places.append((at, at + len(self.token), len(image)))
            long += image + piece
            at += len(self.token) + len(piece)
        return Placed(with_offsets(self.tokenizer, [long])[0], places)

    def prompt_ids(self, sources: Sequence[Any], text: str, *, raw: bool) -> list[int]:
        """The token ids of a prompt with these images: a chat as its template writes it, or, if `raw`, with marks.

        Raises ValueError if it has another number of images.
        """
        text = self.written(text) if raw else text
        if (found := text.count(self.token)) < len(sources):
            raise ValueError(
                f"{counted(found, 'place')} {self.token} for {counted(len(sources), 'image')} in the prompt; the chat "
                f"template leaves out an image: choose another one"
            )
        ids = self.placed(text, sources).ids.tolist()
        begin = self.tokenizer("")["input_ids"][:1] if raw else []
        return ids if ids[: len(begin)] == begin else [*begin, *ids]

    # --- batches

    def sources(self, place: str) -> tuple[Source, ...]:
        """The images of the row at a place."""
        return self.found[place].sources if place in self.found else ()

    def check(self, encoded: Encoded) -> None:
        """Raise DataError, with "file:line", for rows in whose tokens an image is missing or cut."""
        most: dict[str, int] = {}
        problems = []
        for index in range(len(encoded)):
            place = encoded.sources[index]
            try:
                most[place] = max(most.get(place, 0), self._count(encoded, index))
            except ValueError:
                problems.append(
                    f"{place}: data.max_length cuts the row within an image; raise it, shorten the row, or use a "
                    f"smaller image"
                )
        for place, count in most.items():
            wanted = len(self.sources(place))
            if count != wanted:
                problems.append(
                    f"{place}: {counted(count, 'image')} of {wanted:,} are left in its tokens; raise data.max_length, "
                    f"or use a chat template that writes all images"
                )
        if problems:
            raise DataError(problems)

    def rows(self, encoded: Encoded) -> Dataset[dict[str, Any]]:
        """The examples with their images, for `collate`. Raises DataError as `check` does."""
        self.check(encoded)
        return _Rows(encoded, self)

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch, padded on the right, with what the model takes for images. Raises DataError for damaged images."""
        plain = [{key: value for key, value in each.items() if key != "images"} for each in examples]
        batch: dict[str, Any] = Collator(padding_id(self.tokenizer))(plain)
        return {**batch, **self.inputs(batch["input_ids"], [each["images"] for each in examples])}

    def inputs(self, ids: Tensor, images: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
        """What the model takes beside the token ids [B, T], for the images of each row."""
        found: dict[str, Tensor] = {}
        if self._types is not None:
            found[self._types] = torch.isin(ids, self.ids.to(ids.device)).long()
        own = [[upright(each, 3) for each in row] for row in images if row]
        if own:
            texts = [self.token * len(row) for row in own]
            made = self.processor(text=texts, images=own, return_tensors="pt", padding=True)
            found |= {name: value for name, value in made.items() if name not in self._text}
        return found

    # --- what determines a run

    def digests(self) -> dict[str, str]:
        """What identifies the images and the settings of the processor, by name."""
        images = json.dumps(sorted((place, each.digest) for place, each in self.found.items()))
        settings = self.processor.image_processor.to_json_string()
        pairs = {"content of the images": images, "content of the processor of images": settings}
        return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in pairs.items()}

    # --- details

    def _count(self, encoded: Encoded, index: int) -> int:
        """The number of images in an example. Raises ValueError if one is cut."""
        left = int(torch.isin(encoded[index]["input_ids"], self.ids).sum())
        for number, source in enumerate(self.sources(encoded.sources[index])):
            if left == 0:
                return number
            left -= self._tokens(size_of(source))
        if left:
            raise ValueError("an image is cut")
        return len(self.sources(encoded.sources[index]))

    @functools.cache  # noqa: B019  (lives as long as the run)
    def _tokens(self, size: tuple[int, int]) -> int:
        """The number of tokens of an image of a size."""
        ids = torch.tensor(self.tokenizer(self.written_for(size), add_special_tokens=False)["input_ids"])
        return int(torch.isin(ids, self.ids).sum())

    def _written_for(self, size: tuple[int, int]) -> str:
        """What the processor writes for an image of this width and height, in pixels."""
        given = self.processor(
            text=[self.token], images=[[self._blank(size)]], return_text_replacement_offsets=True, return_tensors=None
        )
        found = given.get("text_replacement_offsets")
        if not found or len(found[0]) != 1:
            raise BaseError(f"{type(self.processor).__name__} does not tell how it writes an image")
        return str(found[0][0]["replacement"])

    def _blank(self, size: tuple[int, int]) -> Any:
        return pillow().new("RGB", size)


def seeing_of(path: str, *, revision: str | None = None) -> Seeing | None:
    """The processor of the model in a folder or on the hub, without rows; None if the model reads text alone.

    Raises BaseError if a vision-language model has no processor.
    """
    if not sees(path, revision=revision):
        return None
    config = AutoConfig.from_pretrained(path, revision=revision or "main", trust_remote_code=False)
    return Seeing(load_processor(path, revision=revision), {}, config=config)


class _Rows(Dataset[dict[str, Any]]):
    """The examples of encoded rows, each with `images`, the sources of its images."""

    def __init__(self, encoded: Encoded, seeing: Seeing) -> None:
        self.encoded, self._seeing = encoded, seeing
        self._counts = [seeing._count(encoded, index) for index in range(len(encoded))]

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> dict[str, Any]:
        images = self._seeing.sources(self.encoded.sources[index])[: self._counts[index]]
        return {**self.encoded[index], "images": images}
