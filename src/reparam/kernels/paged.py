"""Attention of single tokens of several requests over a cache of keys and values that is divided into pages.

Request r has one token in the step, and its keys and values are rows of the cache that `index` names:

    out[t] = softmax(scale · query[t] · keys[index[a : a + n]]) · values[index[a : a + n]]

with (t, a, n) = spans[r]. The compiled kernel of `paged_cpu` is for float32 on a CPU; `attend_padded_` uses torch.

Shapes: N tokens of the step, R requests, H heads, K key heads (each for H / K heads), D width of a head, M rows of the
cache, P places in the index, L largest number of keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attend

SHORT = 6
"""Requests with up to 2**SHORT keys are padded to one length; longer ones to lengths of at most twice their own."""


def attend_paged_(
    out: Tensor,  # [N, H, D], contiguous
    query: Tensor,  # [N, H, D]
    keys: Tensor,  # [M, K, D], of which rows are contiguous
    values: Tensor,  # [M, K, D], the same
    index: Tensor,  # [P] int64
    spans: Tensor,  # [R, 3] int64: token, first place in the index, number of keys, at least 1
    scale: float,
    total: int,
) -> None:
    """Write the attention of the requests in `spans` to their tokens in `out`. `total` is the number of their keys.

    Shapes and spans must be valid; they are not checked. With the compiled kernel, the result of a request is bitwise
    independent of the other ones.
    """
    single = torch.float32
    plain = out.dtype is query.dtype is keys.dtype is values.dtype is single and out.device.type == "cpu"
    kernel = _compiled() if plain and query.stride(-1) == 1 else None
    (kernel or attend_padded_)(out, query, keys, values, index, spans, scale, total)


def attend_padded_(
    out: Tensor, query: Tensor, keys: Tensor, values: Tensor, index: Tensor, spans: Tensor, scale: float, total: int
) -> None:
    """The reference: requests with similar numbers of keys are padded to the longest one and computed together."""
    groups: dict[int, list[list[int]]] = {}
    for span in spans.tolist():
        groups.setdefault(max(SHORT, (span[2] - 1).bit_length()), []).append(span)
    for group in groups.values():
        tokens, starts, counts = torch.tensor(group, device=out.device).unbind(1)  # [R] each
        steps = torch.arange(int(counts.max()), device=out.device)  # [L]
        at = index[(starts[:, None] + torch.minimum(steps, counts[:, None] - 1)).flatten()]
        places = (len(group), len(steps), *keys.shape[1:])
        k, v = (table.index_select(0, at).view(places).transpose(1, 2) for table in (keys, values))  # [R, K, L, D]
        mask = (steps < counts[:, None])[:, None, None]
        queries = query[tokens].view(len(group), keys.shape[1], -1, query.shape[-1])  # [R, K, H / K, D]
        out[tokens] = attend(queries, k, v, attn_mask=mask, scale=scale).reshape(len(group), *out.shape[1:])


def backend() -> str:
    """The backend for float32 on a CPU: "numba", or "torch" if numba cannot be imported. Loads the kernel."""
    return "torch" if _compiled() is None else "numba"


@functools.cache
def _compiled() -> Callable[..., None] | None:
    """The compiled kernel, or None if numba cannot be imported. Imported at first use, because that is slow."""
    try:
        from reparam.kernels.paged_cpu import run
    except (ImportError, OSError):  # OSError: llvmlite is installed, but its shared library is missing
        return None
    return run
