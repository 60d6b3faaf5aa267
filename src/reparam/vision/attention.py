"""How much the tokens of an answer attend to each patch of the images in its prompt.

Shapes: T tokens of prompt and answer, Q tokens of the answer, N images, h x w patches of an image.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from reparam.vision.answers import answer_ids
from reparam.vision.blocks import blocks_of
from reparam.vision.model import VoRA


@dataclasses.dataclass(frozen=True)
class Attention:
    """The attention with which a model gave an answer, as means over the heads of each block.

    Attention weights tell where values come from. They do not prove what an answer depends on.
    """

    answer: str
    tokens: tuple[str, ...]
    """The Q tokens of the answer, the last of which may end it."""
    pictures: tuple[Tensor, ...]
    """The images as the model sees them, resized and padded, each [C, H, W] in 0 ... 1."""
    maps: tuple[Tensor, ...]
    """For each image, the attention to its patches, [blocks, Q, h, w]. Over all tokens, the weights of one block sum
    to 1."""

    @property
    def shares(self) -> Tensor:
        """The share of the attention of each block that goes to all images together, [blocks, Q] in 0 ... 1."""
        return torch.stack([found.sum((2, 3)) for found in self.maps]).sum(0)


@torch.no_grad()
def attention(vora: VoRA, text: Any, images: Any, *, raw: bool | None = None, max_new_tokens: int = 16) -> Attention:
    """The likeliest answer to a prompt with images, and the attention of the tokens from which it was predicted.

    The language model must use the attention "eager", as with `load(folder, attention="eager")`. `text`, `images` and
    `raw` are those of `VoRA.generate`. Raises ValueError for another attention, for a prompt without images, if the
    model returns no weights of its attention, and as `VoRA.generate` does.
    """
    used = vora.config.get_text_config()._attn_implementation
    if used != "eager":
        raise ValueError(f"the attention {used} returns no weights; load the model with attention='eager'")
    prompt, answer = answer_ids(vora, text, images, raw=raw, max_new_tokens=max_new_tokens)
    assert vora.processor is not None
    if not prompt["pixel_values"]:
        raise ValueError("the prompt has no image, so no attention goes to one; give an image")
    more = answer.new_full(answer.shape, -1)
    inputs = {
        "input_ids": torch.cat([prompt["input_ids"], answer], 1),
        "image_ids": torch.cat([prompt["image_ids"], more], 1),
        "attention_mask": torch.cat([prompt["attention_mask"], torch.ones_like(answer)], 1),
    }
    places, count = inputs["image_ids"][0], answer.shape[1]
    length = places.shape[0]
    queries = torch.arange(length - count - 1, length - 1)  # each predicts the token that follows it
    with _weights(vora.language, queries, length) as found:
        vora(**inputs, pixel_values=prompt["pixel_values"])
    if len(found) != len(blocks_of(vora.language)[1]):
        raise ValueError(f"{type(vora.language).__name__} returns no weights of its attention, so they cannot be shown")
    weights = torch.stack(found)  # [blocks, Q, T]
    vision = vora.vision
    std, mean = (torch.tensor(values).view(-1, 1, 1) for values in (vision.std, vision.mean))
    pixels = [image.float().cpu() for image in prompt["pixel_values"]]
    tokenizer = vora.processor.tokenizer
    ids = answer[0].tolist()
    return Attention(
        answer=str(tokenizer.decode(ids, skip_special_tokens=True)),
        tokens=tuple(str(tokenizer.decode([token])) for token in ids),
        pictures=tuple((image * std + mean).clamp(0, 1) for image in pixels),
        maps=tuple(
            weights[:, :, places.cpu() == number].unflatten(2, vision.grid(image))
            for number, image in enumerate(pixels)
        ),
    )


@contextlib.contextmanager
def _weights(model: nn.Module, queries: Tensor, length: int) -> Iterator[list[Tensor]]:
    """Collect from each block the attention of `queries` in forward passes, [Q, T], as the mean over its heads.

    Only these rows are kept, because the weights of all tokens of all blocks may not fit into memory.
    """
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(weights, Tensor) and weights.ndim == 4 and weights.shape[2:] == (length, length):
            found.append(weights[0, :, queries.to(weights.device)].float().mean(0).cpu())

    parts = [part for block in blocks_of(model)[1] for part in block.modules() if part is not block]
    held = [part.register_forward_hook(keep) for part in parts]
    try:
        yield found
    finally:
        for handle in held:
            handle.remove()
