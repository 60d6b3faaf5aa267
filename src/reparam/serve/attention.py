"""Attention for packed rows on a CPU, without products between different requests.

transformers' `sdpa` multiplies every query of a step with every key of the step, and masks what belongs to different
requests: its cost grows with the square of the number of requests. Here, a request with several tokens is computed
alone, and requests with one token each are padded to similar lengths and computed together.

Shapes: N tokens of the step, H heads, K key heads, G = H / K, D width of a head, R requests, L keys of a request.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend
from transformers import AttentionInterface, PreTrainedConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache, group_layers_by_attn_type

NAME = "reparam_rows"
SHORT = 6
"""Requests with up to 2**SHORT keys are padded to one length; longer ones to lengths of at most twice their own."""
UNKNOWN = ("softcap", "s_aux", "position_bias")
"""Arguments with which attention is another function. Models that pass them use transformers' own attention."""


def suits(config: PreTrainedConfig, device: torch.device) -> bool:
    """Whether a model can use this attention: on a CPU, without sliding windows and without changed scores."""
    text = config.get_text_config()
    changed = any(getattr(text, name, None) for name in ("attn_logit_softcapping", "attention_sinks", "alibi"))
    plain = config._attn_implementation == "sdpa" and not changed
    return device.type == "cpu" and plain and list(group_layers_by_attn_type(text)) == ["full_attention"]


def register() -> None:
    """Let transformers know this attention by its name."""
    AttentionInterface.register(NAME, rows_attention)


def rows_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cache: PagedAttentionCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, H, N, D], key and value [1, K, N, D] -> [1, N, H, D], each request by itself.

    The keys and values of the step are written to the cache first. Raises ValueError without a cache, and for arguments
    that change attention in a way that this function does not know.
    """
    odd = [name for name in UNKNOWN if kwargs.get(name) is not None]
    if odd or not isinstance(cache, PagedAttentionCache):
        what = f"cannot compute attention with {odd[0]}" if odd else "was called outside of the engine that serves it"
        raise ValueError(f"{type(module).__name__} {what}")
    key, value = cache.update(key, value, module.layer_idx, kwargs)
    begins, starts = kwargs["cu_seq_lens_q"].tolist(), kwargs["cu_seq_lens_k"].tolist()
    out = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])  # [N, H, D]
    together: dict[int, list[int]] = {}
    for i in range(len(begins) - 1):
        count, keys = begins[i + 1] - begins[i], starts[i + 1] - starts[i]
        if count == 1:
            together.setdefault(max(SHORT, (keys - 1).bit_length()), []).append(i)
        elif count:
            queries, held = slice(begins[i], begins[i + 1]), slice(starts[i], starts[i + 1])
            out[queries] = _alone(query[:, :, queries], key[:, :, held], value[:, :, held], scaling)
    for requests in together.values():
        at = [begins[i] for i in requests]
        lengths = [starts[i + 1] - starts[i] for i in requests]
        rows = torch.tensor(at)
        out[rows] = _padded(query[0, :, rows], key[0], value[0], [starts[i] for i in requests], lengths, scaling)
    return out.unsqueeze(0), None


def _alone(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """query [1, H, T, D] -> [T, H, D]: the last T tokens of a request with L keys [1, K, L, D], with a causal mask."""
    count, keys, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value)) if groups > 1 else (key, value)
    mask = None if count == keys else torch.ones(count, keys, dtype=torch.bool).tril(keys - count)
    return attend(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling)[0].transpose(0, 1)


def _padded(
    query: Tensor, key: Tensor, value: Tensor, starts: list[int], lengths: list[int], scaling: float | None
) -> Tensor:
    """query [H, R, D] -> [R, H, D]: one token of each request, whose keys are at `starts` in key [K, ., D]."""
    most = max(lengths)
    steps, own = torch.arange(most), torch.tensor(lengths)[:, None]
    at = (torch.tensor(starts)[:, None] + torch.minimum(steps, own - 1)).flatten()  # [R · L]
    heads, requests, width = query.shape
    # The cache has all heads of a token together, so that whole rows are copied.
    held = [t.transpose(0, 1).index_select(0, at).view(requests, most, len(t), -1) for t in (key, value)]
    keys, values = (t.transpose(1, 2) for t in held)  # [R, K, L, D]
    mask = None if min(lengths) == most else (steps < own)[:, None, None]
    queries = query.view(len(key), heads // len(key), requests, width).permute(2, 0, 1, 3)  # [R, K, G, D]
    return attend(queries, keys, values, attn_mask=mask, scale=scaling).reshape(requests, heads, -1)
