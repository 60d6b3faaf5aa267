"""Images that prompts are about, for a vision-language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reparam.data.chat import ChatTemplate
from reparam.hf.open import base_of
from reparam.images.places import MARK, with_places
from reparam.images.seeing import seeing_of
from reparam.images.sources import Source, check_header
from reparam.io import files
from reparam.io.files import adapter_folder


class Pictures:
    """Images on the disk, which each prompt of a chat is about.

    Raises ValueError if the model reads text alone, and DataError for a file that is missing, damaged or too large.
    """

    def __init__(self, images: Sequence[str], base: str | None, adapter: str | None) -> None:
        folder = adapter_folder(adapter) if adapter is not None else None
        path = base or base_of(None if folder is None else files.read(folder), folder)
        found = seeing_of(path)
        if found is None:
            raise ValueError(
                f"--image: {path} reads text alone; give a vision-language model, teach this one with `reparam vision "
                f"pretrain`, or leave out --image"
            )
        self.sources = tuple(Source(f"--image {image}", path=Path(image)) for image in images)
        for source in self.sources:
            check_header(source)
        self.seeing = found

    def placed(self, prompt: str, before: Sequence[Mapping[str, Any]], *, raw: bool) -> str:
        """The prompt with a place for each image, unless an earlier message of the chat has these.

        Raises ValueError for another number of places than images.
        """
        if any(MARK in str(message["content"]) for message in before):
            return prompt
        return with_places(prompt, len(self.sources), line=not raw)

    def template(self, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        """The chat template, for messages with images."""
        return ChatTemplate(tokenizer, images=self.seeing)

    def ids(self, text: str, *, raw: bool) -> list[int]:
        """The token ids of a chat as its template writes it, or of a text to continue. Raises ValueError."""
        return self.seeing.prompt_ids(self.sources, text, raw=raw)

    def inputs(self, chosen: Sequence[int], ids: Tensor) -> dict[str, Tensor]:
        """What the model takes beside the ids [B, T] of B prompts."""
        return self.seeing.inputs(ids, [self.sources] * len(chosen))
