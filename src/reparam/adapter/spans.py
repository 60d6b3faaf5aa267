"""Packed batches: sequences end to end in one row, each with an adapter of its own.

A sequence must not depend on the others. Attention keeps them apart if the model gets position ids that start again at
each sequence (as transformers and FlashAttention read them), their cumulative lengths, or a mask.

Shapes: N tokens in the packed row.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Spans = Sequence[int] | str
"""The tokens of each sequence, or the argument of the model's forward that tells them, one of `NAMED`."""
NAMED = ("position_ids", "cu_seq_lens_q")


def check(spans: Spans, names: int) -> None:
    """Raise ValueError unless these are spans for this number of names."""
    if isinstance(spans, str):
        if spans not in NAMED:
            raise ValueError(f"select: spans={spans!r}: pass their lengths, or one of {', '.join(NAMED)}")
    elif len(spans) != names or not all(isinstance(n, int) and n > 0 for n in spans):
        raise ValueError(
            f"select: spans={list(spans)} with {names} names: pass one number of tokens, 1 or more, for each name"
        )


def lengths_of(spans: Spans, names: int, batch: Tensor | None, kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens of each sequence in this batch. Raises ValueError if they do not fit it or `names`."""
    if isinstance(spans, str):
        given = kwargs.get(spans)
        if not isinstance(given, Tensor):
            raise ValueError(f"select got spans={spans!r}, but the model was called without {spans}=")
        numbers = given.flatten().tolist()
        if spans == "position_ids":
            starts = [0, *(i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1)]
            numbers = [*starts, len(numbers)]
        lengths = tuple(b - a for a, b in itertools.pairwise(numbers))
        if len(lengths) != names or min(lengths) < 1:
            raise ValueError(
                f"select got {names} adapter names, one per sequence, but {spans} holds {len(lengths)} sequences of "
                f"{list(lengths)} tokens; select one name per sequence"
            )
    else:
        lengths = tuple(spans)
    total = sum(lengths)
    if batch is None or token_dimension(batch, total) is None:
        shape = None if batch is None else list(batch.shape)
        raise ValueError(
            f"select got spans of {total} tokens in all, but the batch has shape {shape}; a packed batch is "
            f"[1, {total}], with the sequences end to end"
        )
    return lengths


def token_dimension(x: Tensor, total: int) -> int | None:
    """Which dimension of a tensor holds the `total` tokens of a packed batch; None if it is not one of tokens."""
    if x.ndim > 1 and x.shape[:2] == (1, total):
        return 1
    return 0 if x.ndim > 0 and len(x) == total else None


def check_apart(lengths: tuple[int, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError if an argument of the model's forward shows that the sequences are not kept apart."""
    ends = list(itertools.accumulate(lengths))
    mask, positions, cumulative = (kwargs.get(name) for name in ("attention_mask", "position_ids", "cu_seq_lens_q"))
    problem = None
    if isinstance(cumulative, Tensor) and cumulative.flatten().tolist() != [0, *ends]:
        problem = f"cu_seq_lens_q is {cumulative.flatten().tolist()}"
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[-2:] == (ends[-1], ends[-1]):
        span = torch.repeat_interleave(torch.tensor(lengths, device=mask.device))
        seen = mask if mask.dtype is torch.bool else mask > torch.finfo(mask.dtype).min / 2
        if bool((seen & (span[:, None] != span)).any()):
            problem = "attention_mask lets tokens of one sequence see another"
    elif mask is None and isinstance(positions, Tensor) and positions.numel() == ends[-1]:
        numbers = positions.flatten().tolist()
        joined = [end for end in ends[:-1] if numbers[end] == numbers[end - 1] + 1]
        if joined:
            problem = f"position_ids continue at token {joined[0]}, where a sequence starts"
    if problem:
        raise ValueError(f"select got sequences of {list(lengths)} tokens, but {problem}")
