"""Measure the cost of using a trained adapter: decoding latency before and after merging, and bytes on disk."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from reparam.adapter.merge import merge
from reparam.hf.open import open_model
from reparam.io.native import read_json
from reparam.io.staged import write_file
from reparam.train.base import BaseConfig
from reparam.train.model import loaded

FILE = "serving.json"
TOKENS = 16  # tokens in the prompt, and tokens that are decoded after it
ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Serving:
    """Figures of one adapter. Seconds are per decoded token at batch size 1, as medians over `ROUNDS` rounds."""

    adapter_bytes: int
    base_seconds: float
    """Latency of the base without the adapter, measured in turns with `seconds`."""
    seconds: float
    merged_seconds: float | None
    merged: str
    """Result of merging: "yes", "yes, keeping <share> of the update", or "no: <reason>"."""


def serving(run: Path, base: BaseConfig) -> Serving:
    """Measure the adapter in the folder of a run, or read the figures if `serving.json` already holds them."""
    file = run / FILE
    if file.exists():
        return Serving(**read_json(file))
    folder = run / "adapter"
    size = sum(part.stat().st_size for part in folder.rglob("*") if part.is_file())
    model, _, adapter = open_model(base.path, folder, dtype=base.dtype)
    assert adapter is not None
    plain = loaded(base, adapter.head)
    base_seconds, seconds = _in_turns(plain, model)
    merged_seconds, merged = None, "yes"
    try:
        report = merge(model)
    except ValueError as error:  # the update depends on its input, or the merged weights would not be finite
        merged = f"no: {str(error).split(chr(10))[0]}"
    else:
        share = min(report.survival().values(), default=1.0)
        merged = "yes" if share > 0.995 else f"yes, keeping {share:.3f} of the update"
        _, merged_seconds = _in_turns(plain, model)
    found = Serving(size, base_seconds, seconds, merged_seconds, merged)
    write_file(file, (json.dumps(dataclasses.asdict(found), indent=1) + "\n").encode())
    return found


def _in_turns(*models: nn.Module) -> list[float]:
    """Median seconds per token of each model. The models take turns, so that other load on the machine affects all."""
    rounds = [[_decode(model) for model in models] for _ in range(ROUNDS + 1)][1:]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


@torch.no_grad()
def _decode(model: nn.Module) -> float:
    """Seconds per token for decoding TOKENS tokens greedily, with the forward pass of the prompt included.

    For a model that writes no text, of a forward pass over TOKENS tokens.
    """
    device = next(model.parameters()).device
    rows = int(model.config.vocab_size)  # type: ignore[union-attr,arg-type]
    prompt = (torch.arange(TOKENS, device=device) % rows)[None]
    _wait()
    began = time.perf_counter()
    if not model.can_generate():  # type: ignore[operator]
        model(input_ids=prompt, attention_mask=torch.ones_like(prompt))
        _wait()
        return (time.perf_counter() - began) / TOKENS
    model.generate(  # type: ignore[operator]
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=TOKENS,
        max_new_tokens=TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    _wait()
    return (time.perf_counter() - began) / TOKENS


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
