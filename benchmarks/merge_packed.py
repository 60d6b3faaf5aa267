"""Measure how much of an update survives a merge into 4-bit or 8-bit storage, with the rounding `nearest` or `aware`.

The matrix W is 1024 x 1024 with entries from N(0, 1); the update has rank 16 and a given size |ΔW| / |W|. Survival is
the share of ΔW in the merged weights, ⟨merged − W, ΔW⟩ / ⟨ΔW, ΔW⟩. Noise is the rest, |merged − W − ΔW| / |ΔW|. The
error of the effect is |(merged − W − ΔW) x| / |ΔW x| for inputs x from the row space of A. For comparison, the
quantization error of NF4 on such a matrix is 0.092 |W|.

With `--adapter`, an adapter from `reparam train` on a quantized base is merged in every way and scored on `--data`.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
from torch import nn

import reparam
from reparam.adapter.quantize import reports
from reparam.core.base import Factors, Storage, Weight
from reparam.data.encode import encode
from reparam.data.rows import read_rows
from reparam.evaluation.score import score_loss
from reparam.hf.models import vocabulary
from reparam.hf.open import open_model

SIDE, RANK = 1024, 16
SIZES = (0.002, 0.01, 0.05, 0.2)


def update(size: float) -> Factors:
    """A random update of rank 16 whose norm is about `size` times that of a matrix with entries from N(0, 1)."""
    return Factors(torch.randn(RANK, SIDE), size * torch.randn(SIDE, RANK) / RANK**0.5)


def lost(weight: Weight, factors: Factors, rounding: str) -> tuple[float, float, float]:
    """Survival, noise, and error of the effect of one merge."""
    old = weight.dense()
    delta, written = factors.change(old), weight.requantize(factors, rounding).dense() - old
    x = factors.A.T @ torch.randn(RANK, 64)
    wrong = written - delta
    survival = float((written * delta).sum() / delta.square().sum())
    return survival, float(wrong.norm() / delta.norm()), float((wrong @ x).norm() / (delta @ x).norm())


def synthetic(storages: list[Storage]) -> None:
    """Print the table for random updates of all sizes."""
    columns = [f"{what}, {how}" for how in ("nearest", "aware") for what in ("survival", "noise", "error of effect")]
    print(f"| storage | size of ΔW over W | {' | '.join(columns)} |\n|{'---|' * (2 + len(columns))}")
    for storage in storages:
        weight = storage.quantize(torch.randn(SIDE, SIDE))
        for size in SIZES:
            factors = update(size)
            cells = [f"{value:.3f}" for how in ("nearest", "aware") for value in lost(weight, factors, how)]
            print(f"| {storage.name} | {size:.1%} | {' | '.join(cells)} |")


def real(adapter: str, data: Path) -> None:
    """Print the scores of one adapter, not merged and merged in every way."""
    rows = read_rows(data)

    def score(model: nn.Module, tokenizer: object) -> str:
        encoded = encode(rows, tokenizer, max_length=512, vocab_size=vocabulary(model))
        found = score_loss(model, encoded, tokenizer, batch=8)
        return f"{found.value:.4f} ({found.low:.4f} to {found.high:.4f})"

    print("\n| | score, 95 % interval | survival |\n|---|---|---|")
    model, tokenizer, _ = open_model(None, adapter, dtype="float32")
    with reparam.select(model, None):
        print(f"| quantized base | {score(model, tokenizer)} | |")
    print(f"| adapter, not merged | {score(model, tokenizer)} | |")
    ways = {
        "merged, dequantized into bfloat16": {},
        "merged onto the original bfloat16 base": {"onto": "dense"},
        "merged into its storage, nearest": {"into": True, "rounding": "nearest"},
        "merged into its storage, aware": {"into": True, "rounding": "aware"},
    }
    for what, way in ways.items():
        model, tokenizer, _ = open_model(None, adapter, dtype="bfloat16", storage=way.get("onto"))
        storage = reports(model)[0].storage.name if way.get("into") else None
        report = reparam.merge(model, into=storage, rounding=way.get("rounding", "aware"), force=True)
        share = ", ".join(f"{value:.4f}" for value in report.survival().values())
        print(f"| {what} | {score(nn.Module.float(model), tokenizer)} | {share} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", help="folder of a training run on a quantized base")
    parser.add_argument("--data", type=Path, help="JSONL file of rows to score the adapter on")
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    synthetic([reparam.NF4(), reparam.Int8()])
    if given.adapter:
        real(given.adapter, given.data)
    print("\n    python benchmarks/merge_packed.py")


if __name__ == "__main__":
    main()
