"""Forward passes that continue a generation. In these, what was computed at its start is still valid.

A model's pre-hook notes it, and the sites ask `trusted`: comparing contents at each token would cost more than it
brings. Writes that torch counts are seen all the same.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_now = threading.local()


def continues(kwargs: Mapping[str, Any]) -> bool:
    """Whether a model called with these arguments continues from a KV cache that holds tokens."""
    cache: Any = kwargs.get("past_key_values")
    return hasattr(cache, "get_seq_length") and cache.get_seq_length() > 0


def begin(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A pre-hook for a model: note whether this forward pass continues a generation."""
    if not torch.compiler.is_compiling():
        _now.continues = continues(kwargs)


def end(model: nn.Module, *_: Any) -> None:
    """A hook for a model, also after errors: the forward pass has ended."""
    if not torch.compiler.is_compiling():
        _now.continues = False


def trusted() -> bool:
    """Whether a forward pass that continues a generation is in progress in this thread."""
    return getattr(_now, "continues", False)
