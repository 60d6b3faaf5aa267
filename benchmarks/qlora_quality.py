"""Measure the loss of quality from 4-bit storage: bits per byte on `reference` after QLoRA minus those after LoRA.

A seed determines the adapter's initial values and the order of the rows. The two runs with a seed differ only in the
storage of the base, so their difference is paired; its 95 % interval is Student's over the seeds. This tests the claim
of QLoRA's paper (Dettmers et al. 2023, §4) that training on NF4 with double quantization loses nothing.

Runs whose figures are in the output folder are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import runs
import torch
from rich.console import Console

from reparam.evaluation.evaluate import evaluate
from reparam.methods.lora import LoRA
from reparam.train.base import BaseConfig
from reparam.train.config import Config
from reparam.train.run import train
from reparam.train.sections import DataConfig, OptimConfig, RunConfig
from reparam.train.show import Show

TASK = runs.ROOT / "assets/tasks/reference"
STORAGES = ("dense", "nf4")


def bits(folder: Path, storage: str, seed: int, *, steps: int) -> dict[str, float]:
    """Bits per byte on `valid` and `test`, of the base ("base valid", "base test") and after training."""
    output = folder / f"{storage}-{seed}"
    file = output / "bits.json"
    if file.exists():
        return json.loads(file.read_text())
    config = Config(
        base=BaseConfig(path=str(runs.ROOT / "assets/tiny-python"), dtype="float32", storage=storage),
        data=DataConfig(train=str(TASK / "train.jsonl"), valid=str(TASK / "valid.jsonl"), max_length=512),
        method=LoRA(r=8, alpha=16, seed=seed),
        optim=OptimConfig(learning_rate=5e-3),
        run=RunConfig(
            output=str(output), epochs=2, max_steps=steps, eval_every=10**6, save_every=10**6, resume=False, seed=seed
        ),
    )
    result = train(config, show=Show(Console(quiet=True)))
    test = evaluate(TASK / "test.jsonl", None, str(output), dtype="float32", max_length=512, batch=16)
    assert test.adapter is not None
    found = {
        "base valid": result.before[0].value,
        "base test": test.base[0].value,
        "valid": result.after[0].value,
        "test": test.adapter[0].value,
    }
    file.write_text(json.dumps(found))
    return found


def interval(values: list[float]) -> str:
    """Format the mean and Student's 95 % interval."""
    mean, half = runs.interval(values)
    return f"{mean:+.4f} ({mean - half:+.4f} to {mean + half:+.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, choices=(2, 3, 4, 5, 6, 8, 10))
    parser.add_argument("--output", type=Path, default=Path("out/qlora-quality"))
    parser.add_argument("--quick", action="store_true", help="two seeds and three steps, to check that the script runs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    seeds, steps = (2, 3) if given.quick else (given.seeds, -1)
    found = {storage: [bits(given.output, storage, seed, steps=steps) for seed in range(seeds)] for storage in STORAGES}
    print("| bits per byte on `reference` | LoRA on float32 | QLoRA (NF4, double quantization) | difference, 95 % |")
    print("|---|---|---|---|")
    for key, what in (("base", "base"), ("", f"after training, {seeds} seeds")):
        for side in ("valid", "test"):
            name = f"{key} {side}".strip()
            dense, nf4 = ([run[name] for run in found[storage]] for storage in STORAGES)
            cell = f"{nf4[0] - dense[0]:+.4f}" if key else interval([b - a for a, b in zip(dense, nf4, strict=True)])
            print(f"| {what}, {side} | {statistics.mean(dense):.4f} | {statistics.mean(nf4):.4f} | {cell} |")
    print("\n    python benchmarks/qlora_quality.py")


if __name__ == "__main__":
    main()
