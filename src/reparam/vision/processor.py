"""Tokens and pixels together: the inputs of a model that sees, from text with places for images.

A place is written as `<image>`. If a text has images and no place, they come first.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken
from torch import Tensor

from reparam.core.text import counted
from reparam.data.batches import padding_id
from reparam.data.chat import ChatTemplate
from reparam.data.framing import frame
from reparam.images.places import MARK, placed_messages, with_places
from reparam.io.prompt_format import PromptFormat
from reparam.vision.images import decoded
from reparam.vision.patches import Vision

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[Mapping[str, Any]]


def marked(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer that has `<image>` as one token; its id may be outside of the model's vocabulary."""
    found = copy.deepcopy(tokenizer)
    found.add_tokens([AddedToken(MARK, normalized=False, special=False)])
    return found


def mark_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of `<image>` in a tokenizer that `marked` made."""
    return int(tokenizer.convert_tokens_to_ids(MARK))  # type: ignore[arg-type]


def expanded(ids: Sequence[int], counts: Sequence[int], mark: int, fill: int) -> tuple[list[int], list[int]]:
    """Token ids with `fill` at the places of images, as often as each has tokens, and the number of each token's image.

    >>> expanded([7, 99, 8], [2], mark=99, fill=0)
    ([7, 0, 0, 8], [-1, 0, 0, -1])
    """
    tokens: list[int] = []
    images: list[int] = []
    number = 0
    for token in ids:
        if token == mark:
            tokens += [fill] * counts[number]
            images += [number] * counts[number]
            number += 1
        else:
            tokens.append(token)
            images.append(-1)
    return tokens, images


class Processor:
    """Makes the inputs of `VoRA.generate_ids` from texts and images.

    Args:
        tokenizer: the tokenizer of the language model; it is not changed.
        vision: the settings of the patch embedding.
        prompt_format: how the model was trained; None for a chat if the tokenizer has a chat template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vision: Vision, prompt_format: PromptFormat | None = None
    ) -> None:
        self.tokenizer, self.vision, self.prompt_format = tokenizer, vision, prompt_format
        self.marked = marked(tokenizer)
        told = prompt_format
        if told is not None and told.chat_template is not None:
            self.marked.chat_template = told.chat_template
        self.chats = bool(self.marked.chat_template) and (told is None or told.rows in ("chat", "mixed"))
        """Whether a text is put into the chat template, or continued."""

    def __call__(
        self, text: Prompt | Sequence[Prompt], images: Any = None, *, raw: bool | None = None
    ) -> dict[str, Any]:
        """The inputs for one prompt, or for several, which are padded on the left.

        Args:
            text: a text, or the messages of a chat; or a list of these.
            images: for one prompt, an image or a list of images: paths, Pillow images, bytes, or tensors [C, H, W] in
                0 ... 1. For several prompts, a list with an image or a list of images (None for no image) for each.
            raw: whether a text is continued as it is; by default, as the model was trained.

        Returns `input_ids`, `attention_mask` and `image_ids`, all [B, L] int64, and the list `pixel_values`.
        Raises ValueError if the places and the images of a prompt differ in number, and DataError for a damaged image.
        """
        one = isinstance(text, str) or (len(text) > 0 and isinstance(text[0], Mapping))
        prompts: list[Any] = [text] if one else list(text)
        given = [images] if one else list(images if images is not None else [None] * len(prompts))
        if len(given) != len(prompts):
            raise ValueError(f"{counted(len(prompts), 'prompt')} and the images of {len(given)}; give a list for each")
        rows: list[tuple[list[int], list[int]]] = []
        pixels: list[Tensor] = []
        for number, (prompt, its) in enumerate(zip(prompts, given, strict=True)):
            own = [] if its is None else list(its) if isinstance(its, list | tuple) else [its]
            made = [decoded(image, self.vision) for image in own]
            counts = [int(torch.tensor(self.vision.grid(image)).prod()) for image in made]
            try:
                ids = self._ids(prompt, len(own), self.chats and not raw if raw is not None else self.chats)
            except ValueError as error:
                raise ValueError(f"prompt {number}: {error}" if not one else str(error)) from None
            tokens, places = expanded(ids, counts, mark_id(self.marked), padding_id(self.tokenizer))
            rows.append((tokens, [place + len(pixels) if place >= 0 else -1 for place in places]))
            pixels += made
        width = max(len(tokens) for tokens, _ in rows)

        def padded(values: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([[fill] * (width - len(value)) + value for value in values])

        return {
            "input_ids": padded([tokens for tokens, _ in rows], padding_id(self.tokenizer)),
            "attention_mask": padded([[1] * len(tokens) for tokens, _ in rows], 0),
            "image_ids": padded([places for _, places in rows], -1),
            "pixel_values": pixels,
        }

    def _ids(self, prompt: Prompt, images: int, chat: bool) -> list[int]:
        """The ids of a prompt, with one `<image>` for each image."""
        if isinstance(prompt, str):
            if not chat:
                found = list(self.marked(with_places(prompt, images, line=False))["input_ids"])
                return self._found(found, images)
            prompt = [{"role": "user", "content": prompt}]
        if not self.marked.chat_template:
            raise ValueError("the tokenizer has no chat template; give a text instead of messages")
        messages = placed_messages(prompt, images)
        told = self.prompt_format
        framed = (
            frame(self.marked, system=told.system, thinking=told.thinking) if told is not None else frame(self.marked)
        )
        text = self._template.prompt(framed.messages(messages), framed.variables)
        return self._found(list(self.marked(text, add_special_tokens=False)["input_ids"]), images)

    def _found(self, ids: list[int], images: int) -> list[int]:
        if not ids:
            raise ValueError("the prompt is empty, so there is nothing to continue")
        if ids.count(mark_id(self.marked)) != images:
            raise ValueError("the chat template leaves out an image, or repeats one; choose another template")
        return ids

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.marked)
