"""The attention mask of sequences with images, made by transformers' own mask functions.

    allow(i, j) = valid(j) and (j <= i or i and j belong to the same image)

In layers with a sliding window, j <= i also asks that j is inside the window; the tokens of one image always see each
other. Images are told apart by their numbers, so adjacent images stay apart.

Shapes: B rows, L tokens of a row, S tokens so far, with those in a cache.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import create_masks_for_generate

KINDS = ("full_attention", "sliding_attention", "chunked_attention")
IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")


def check_masks(model: nn.Module) -> None:
    """Raise ValueError if the tokens of an image cannot see each other in this language model."""
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; images need a decoder language model")
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - {*KINDS})
    if odd:
        raise ValueError(
            f"{type(model).__name__} has layers without an attention mask ({', '.join(odd)}), in which the tokens of "
            f"an image cannot see each other; use a decoder with attention in all layers"
        )
    used = config._attn_implementation
    if used not in IMPLEMENTATIONS:
        raise ValueError(
            f"the attention {used} takes no mask in which the tokens of an image see each other; load the model with "
            f"attn_implementation {' or '.join(repr(name) for name in IMPLEMENTATIONS)}"
        )


def image_mask(
    model: nn.Module,
    embeds: Tensor,
    valid: Tensor,
    images: Tensor,
    *,
    positions: Tensor | None = None,
    past: Any = None,
) -> Any:
    """The mask for the attention of this model, as its forward takes it: a tensor, or one for each kind of layer.

    Args:
        model: the language model; its configuration says which attention it uses.
        embeds: the embeddings of the tokens to compute, [B, L, hidden].
        valid: which tokens are no padding, [B, S] int64.
        images: the number of the image that each token belongs to, and -1 for text, [B, S] int64.
        positions: positions of the tokens to compute, [B, L] int64.
        past: transformers' cache of the S - L tokens before them.
    """
    return create_masks_for_generate(
        model.config,  # type: ignore[arg-type]
        embeds,
        valid,
        past,
        positions,
        block_sequence_ids=images,
    )
