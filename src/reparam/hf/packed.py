"""Whether a model keeps the examples of a pack apart, and how its batches are made."""

from __future__ import annotations

import contextlib
import inspect

import torch
from torch import Tensor, nn

from reparam.adapter.selection import select
from reparam.data.packing import PackedCollator
from reparam.hf.prompts import is_prompted
from reparam.sites.wrapped import bare

_LENGTHS = (5, 3, 7)  # tokens of the examples in the trial
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
_EQUAL = {torch.float32: 1e-3, torch.float64: 1e-3}
"""How far the logits in a pack may be from those alone, in standard deviations; see `_HALF` for other dtypes."""
_APART = {torch.float32: 1e-5, torch.float64: 1e-5}
"""How far they may change with the tokens of the example before."""
_HALF = 5e-2


def packed_collator(model: nn.Module, pad_id: int) -> PackedCollator:
    """The collator for this model: with FlashAttention, the packs of a batch are end to end in one row."""
    attention = getattr(getattr(bare(model), "config", None), "_attn_implementation", None)
    return PackedCollator(pad_id, flat="flash" in (attention or ""))


def unpackable_reason(model: nn.Module) -> str | None:
    """Why rows cannot be packed for this model, as the end of a sentence; None if they can.

    The base model computes three short examples in a pack and alone, and the logits are compared.
    """
    inner = bare(model)
    if is_prompted(model):
        return "virtual tokens stand before a whole row, not before each of its examples"
    adapted = hasattr(inner, "reparam_state")
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        return f"{type(inner).__name__} takes no position_ids, which tell the examples apart"
    config = inner.config.get_text_config()  # type: ignore[union-attr, operator]
    if others := {*(getattr(config, "layer_types", None) or ())} - _ATTENTION:
        return f"{type(inner).__name__} has layers ({', '.join(sorted(others))}) in which examples would mix"
    training = model.training
    try:
        with select(model, None) if adapted else contextlib.nullcontext(), torch.no_grad():
            same = _apart(model.eval())
    finally:
        model.train(training)
    return None if same else f"{type(inner).__name__} does not keep the examples of a pack apart"


def _apart(model: nn.Module) -> bool:
    """Whether the logits of examples in a pack are those of the examples alone, and do not change with the others."""
    parameter = next(model.parameters())
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    draw = torch.Generator().manual_seed(0)
    collate = packed_collator(model, 0)

    def logits(*packs: list[Tensor]) -> Tensor:
        batch = collate([_pack(examples) for examples in packs])
        inputs = {key: batch[key].to(parameter.device) for key in ("input_ids", "position_ids")}
        found: Tensor = model(**inputs, use_cache=False).logits.flatten(0, 1)
        return found.float()

    examples = [torch.randint(0, vocabulary, (length,), generator=draw) for length in _LENGTHS]
    others = [(example + 1) % vocabulary for example in examples]
    short = examples[:1]  # a second pack, which gets padding
    together = logits(examples, short)
    alone = torch.cat([logits([example]) for example in examples])
    changed = logits([*others[:-1], examples[-1]], short)
    spread, count, last = alone.std(), len(alone), len(examples[-1])
    equal = (together[:count] - alone).abs().max() <= _EQUAL.get(parameter.dtype, _HALF) * spread
    apart = (together - changed)[count - last : count].abs().max() <= _APART.get(parameter.dtype, _HALF) * spread
    return bool(equal and apart)


def _pack(examples: list[Tensor]) -> dict[str, Tensor]:
    ids = torch.cat(examples)
    positions = torch.cat([torch.arange(len(example)) for example in examples])
    return {"input_ids": ids, "labels": ids, "position_ids": positions, "row": torch.arange(len(examples))}
