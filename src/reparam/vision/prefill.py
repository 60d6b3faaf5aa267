"""Give the forward passes of transformers' `generate` the images of a prompt.

Shapes: B prompts, L tokens of a prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reparam.vision.mask import image_mask


class Prompt:
    """A pre-hook of a language model: in passes that hold tokens of the prompt, gives its embeddings and the mask.

    Args:
        embeds: the embeddings of the prompts, with those of images, [B, L, hidden].
        valid: which of their tokens are no padding, [B, L].
        images: the number of the image that each token belongs to, -1 for text, [B, L].
        masked: whether the tokens of an image see each other.

    It also knows passes with several copies of each prompt (beams), and those without a cache.
    """

    def __init__(self, embeds: Tensor, valid: Tensor, images: Tensor, *, masked: bool) -> None:
        self.embeds, self.valid, self.images, self.masked = embeds, valid, images, masked

    def __call__(self, model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """The arguments of the pass with embeddings and mask; None to leave them as they are."""
        ids, past = kwargs.get("input_ids"), kwargs.get("past_key_values")
        start = past.get_seq_length() if past is not None else 0
        if ids is None or start >= self.embeds.shape[1]:
            return None  # only generated tokens, which see all that is valid
        end = start + ids.shape[1]
        copies = len(ids) // len(self.embeds)  # beams and several answers of a prompt
        embeds, valid, images = (part.repeat_interleave(copies, 0) for part in (self.embeds, self.valid, self.images))
        more = end - embeds.shape[1]
        if more > 0:  # tokens that were generated without a cache
            new = model.get_input_embeddings()(ids[:, -more:])
            embeds = torch.cat([embeds, new], 1)
            valid = torch.cat([valid, valid.new_ones(len(ids), more)], 1)
            images = torch.cat([images, images.new_full((len(ids), more), -1)], 1)
        changed = {**kwargs, "inputs_embeds": embeds[:, start:end]}
        del changed["input_ids"]
        if self.masked:
            changed["attention_mask"] = image_mask(
                model,
                changed["inputs_embeds"],
                valid[:, :end],
                images[:, :end],
                positions=kwargs.get("position_ids"),
                past=past,
            )
        return args, changed
