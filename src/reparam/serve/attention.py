"""Attention for packed rows on a CPU, without products between different requests.

transformers' `sdpa` multiplies every query of a step with every key of the step, and masks what belongs to different
requests: its cost grows with the square of the number of requests. Here, a request with several tokens is computed
alone, and those with one token read their keys and values where the cache has them (`kernels/paged.py`).

Shapes: N tokens of the step, H heads, K key heads, D width of a head, R requests, T tokens and L keys of a request, M
rows of the cache, P places in the index.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend
from transformers import AttentionInterface, PreTrainedConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache, group_layers_by_attn_type

from reparam.kernels.paged import attend_paged_, backend

NAME = "reparam_rows"
UNKNOWN = ("softcap", "s_aux", "position_bias")
"""Arguments with which attention is another function. Models that pass them use transformers' own attention."""
CACHE = "batch_processor.cache.layer_to_allocator batch_processor.cache.cache_allocators"
ALLOCATOR = "_kv_token_views index layer_type"
"""What this reads of the cache and of its parts for layers."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where the requests of a step have their tokens, keys and values. All layers of the step use it."""

    step: object
    """What only this step has, so that another step is not mistaken for it."""
    index: Tensor
    """[P] int64: the rows of the cache that the requests read, end to end."""
    single: Tensor
    """[R, 3] int64: of requests with one token, that token, the first place in the index, and the number of keys."""
    total: int
    """The keys of these requests."""
    several: list[tuple[slice, slice]]
    """The tokens of the other requests, and their places in the index."""

    @classmethod
    def of(cls, step: object, index: Tensor, tokens: list[int], keys: list[int]) -> Plan:
        """`tokens` and `keys` are where each request begins and, at last, where the last one ends."""
        spans = [(tokens[i], keys[i], keys[i + 1] - keys[i]) for i in range(len(tokens) - 1)]
        counts = [tokens[i + 1] - tokens[i] for i in range(len(tokens) - 1)]
        # A new request of one token has a key, but the index of a step without earlier tokens is empty.
        single = [span for span, count in zip(spans, counts, strict=True) if count == 1 and len(index)]
        several = [
            (slice(token, token + count), slice(first, first + length))
            for (token, first, length), count in zip(spans, counts, strict=True)
            if count > 1 or (count == 1 and not len(index))
        ]
        found = torch.tensor(single, dtype=torch.int64).view(-1, 3)
        return cls(step, index, found, sum(length for _, _, length in single), several)


def suits(config: PreTrainedConfig, device: torch.device) -> bool:
    """Whether a model can use this attention: on a CPU, without sliding windows and without changed scores."""
    text = config.get_text_config()
    changed = any(getattr(text, name, None) for name in ("attn_logit_softcapping", "attention_sinks", "alibi"))
    plain = config._attn_implementation == "sdpa" and not changed
    return device.type == "cpu" and plain and list(group_layers_by_attn_type(text)) == ["full_attention"]


def register() -> None:
    """Let transformers know this attention by its name, and load its kernel, so that the first step need not."""
    backend()
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
    allocator: Any = cache.layer_to_allocator[module.layer_idx]  # type: ignore[index]
    keys, values = allocator._kv_token_views[module.layer_idx]  # [M, K, D]
    packed, plan = (key[0].transpose(0, 1), value[0].transpose(0, 1)), _plan(cache, allocator, kwargs)  # [N, K, D]
    for table, new in zip((keys, values), packed, strict=True):
        table.index_copy_(0, kwargs["write_index"][allocator.index], new)
    out = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])  # [N, H, D]
    for tokens, places in plan.several:
        count, held = tokens.stop - tokens.start, [t[tokens] for t in packed]
        if places.stop - places.start > count:  # it has earlier tokens, too
            held = [table.index_select(0, plan.index[places]) for table in (keys, values)]
        out[tokens] = _alone(query[0, :, tokens], held[0].transpose(0, 1), held[1].transpose(0, 1), scaling)
    if len(plan.single):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        attend_paged_(out, query[0].transpose(0, 1), keys, values, plan.index, plan.single, scale, plan.total)
    return out.unsqueeze(0), None


def _plan(cache: Any, allocator: Any, kwargs: Mapping[str, Any]) -> Plan:
    """That of the step, which the first layer makes. The cache keeps it until the next step."""
    indices = kwargs["read_index"]  # a list that each step makes anew and passes to all layers
    plan: Plan | None = cache.__dict__.get("reparam_plan")
    if plan is None or plan.step is not indices:
        ends = kwargs["cu_seq_lens_k"][allocator.layer_type].tolist()
        plan = Plan.of(indices, indices[allocator.index], kwargs["cu_seq_lens_q"].tolist(), ends)
        cache.reparam_plan = plan
    return plan


def _alone(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """query [H, T, D] -> [T, H, D]: the last T tokens of a request with keys [K, L, D], with a causal mask."""
    count, keys, groups = query.shape[1], key.shape[1], len(query) // len(key)
    key, value = (t.repeat_interleave(groups, 0) for t in (key, value)) if groups > 1 else (key, value)
    mask = None if count == keys else torch.ones(count, keys, dtype=torch.bool).tril(keys - count)
    causal = mask is None
    return attend(query[None], key[None], value[None], attn_mask=mask, is_causal=causal, scale=scaling)[0].transpose(
        0, 1
    )
