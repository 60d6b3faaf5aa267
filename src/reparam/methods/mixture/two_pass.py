"""The first pass of X-LoRA: the last hidden states of the base model, from which the second pass computes its gates.

It is a forward pass of the model without the adapter and without gradients. In generation it has a KV cache of its own,
because the keys and values of the base and of the adapted model differ. Both caches are reordered together.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn

LEFT_OUT = ("labels", "num_items_in_batch", "task")
LAST = "logits_to_keep"  # an argument of transformers' models: for how many tokens at the end to compute logits


class ByCache(weakref.WeakKeyDictionary[Any, Any]):
    """Values that live as long as a KV cache. None is pickled with a model: caches belong to running generations."""

    def __reduce__(self) -> Any:
        return ByCache, ()


class FirstPass:
    """Runs the first passes of one model, and keeps a KV cache for each cache of the second pass."""

    def __init__(self) -> None:
        self.caches = ByCache()

    @torch.no_grad()
    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The last hidden states [B, L, H] of the base model for these arguments.

        Raises ValueError if the model returns no hidden states, or if the cache has tokens that no first pass has seen.
        """
        inputs = {name: value for name, value in kwargs.items() if name not in LEFT_OUT}
        cache = inputs.pop("past_key_values", None)
        inputs |= {"output_hidden_states": True, "return_dict": True, "use_cache": cache is not None}
        if LAST in inspect.signature(model.forward).parameters:
            inputs[LAST] = 1  # the logits are not used, and the largest tensor of most forward passes
        if cache is not None:
            inputs["past_key_values"] = self._beside(cache)
        try:
            found = model(*args, **inputs)
        except TypeError as error:
            raise ValueError(
                f"router 'two_pass' needs a transformers model that returns hidden states: {error}"
            ) from error
        states = getattr(found, "hidden_states", None)
        if not states:
            raise ValueError(f"router 'two_pass' needs hidden states, but {type(model).__name__} returns none")
        return states[-1]

    def _beside(self, cache: Any) -> Any:
        """The KV cache of the first pass that belongs to this cache of the second pass."""
        own = self.caches.get(cache)
        seen = cache.get_seq_length()
        if own is None and seen == 0:
            own = self.caches[cache] = copy.deepcopy(cache)
            _follow(cache, own)
        if own is None or own.get_seq_length() != seen:
            raise ValueError(
                f"router 'two_pass': the cache holds {seen} tokens, but the first pass has seen "
                f"{0 if own is None else own.get_seq_length()}; select the adapter before the prompt is processed, and "
                f"do not copy or crop the cache"
            )
        return own


def _follow(cache: Any, other: Any) -> None:
    """Reorder the rows of `other` whenever those of `cache` are reordered, as in beam search."""
    if not hasattr(cache, "reorder_cache"):
        return
    reorder = cache.reorder_cache

    def both(rows: Tensor) -> None:
        reorder(rows)
        other.reorder_cache(rows)

    cache.reorder_cache = both
