"""The first pass of X-LoRA: the base model's last hidden states, from which the gates of the second are computed.

It is a forward of the model without the adapter and without gradients. With a cache it has a cache of its own, because
the base's keys and values are others than the adapted model's; when rows of one are reordered, the other's follow.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn

LEFT_OUT = ("labels", "num_items_in_batch", "task")


class FirstPass:
    """Runs first passes of one model, and keeps their caches beside those of the second."""

    def __init__(self) -> None:
        self.caches: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    @torch.no_grad()
    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The last hidden states [B, L, H] for what the model is called with.

        Raises ValueError for a model that gives none, and for a cache whose tokens the base has not seen.
        """
        inputs = {name: value for name, value in kwargs.items() if name not in LEFT_OUT}
        cache = inputs.pop("past_key_values", None)
        inputs |= {"output_hidden_states": True, "return_dict": True, "use_cache": cache is not None}
        if cache is not None:
            inputs["past_key_values"] = self._beside(cache)
        try:
            found = model(*args, **inputs)
        except TypeError as error:
            raise ValueError(
                f"router 'two_pass' needs a transformers model that gives hidden states: {error}"
            ) from error
        states = getattr(found, "hidden_states", None)
        if not states:
            raise ValueError(f"router 'two_pass' needs hidden states, and {type(model).__name__} gives none")
        return states[-1]

    def _beside(self, cache: Any) -> Any:
        """The first pass's cache for one of the second."""
        own = self.caches.get(cache)
        seen = cache.get_seq_length()
        if own is None and seen == 0:
            own = self.caches[cache] = copy.deepcopy(cache)
            _follow(cache, own)
        if own is None or own.get_seq_length() != seen:
            raise ValueError(
                f"router 'two_pass': the cache holds {seen} tokens, and the first pass has seen "
                f"{0 if own is None else own.get_seq_length()} of them; select the adapter before the prompt is read, "
                f"and pass the cache object on uncopied and uncut"
            )
        return own


def _follow(cache: Any, other: Any) -> None:
    """Have `other` reordered whenever `cache` is, as beam search does."""
    if not hasattr(cache, "reorder_cache"):
        return
    reorder = cache.reorder_cache

    def both(rows: Tensor) -> None:
        reorder(rows)
        other.reorder_cache(rows)

    cache.reorder_cache = both
