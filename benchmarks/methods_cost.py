"""Measure CPU seconds and memory of a training step of each method, at the sizes of `methods.py`.

The batch is 8 rows of 128 tokens of `reference`. Memory, as counted by torch, is what is held between steps (weights,
adapters, optimizer states), and the additional peak within one step. AdaLoRA is measured with its initial ranks and
with its final ranks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import measure
import methods as m
import runs
import torch
from torch import Tensor, nn

KINDS = ("full", "lora", "lora_plus", "dora", "adalora", "adalora, final ranks", "qlora", "qdora", "qadalora")


def contestant(
    kind: str, batch: dict[str, Tensor], steps: int
) -> tuple[measure.Call, nn.Module, torch.optim.Optimizer]:
    """Return a training step as a callable, its model and its optimizer, after at least one step."""
    name, _, final = kind.partition(", ")
    total = 5 if final else 100 * steps
    model, _, optimizer = m.started(m.Job("reference", name, 1e-4, 0), total)
    model.train()

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(total if final else 1):
        step()
    return step, model, optimizer


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, buffers and optimizer states; shared memory is counted once."""
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    tensors = [*model.parameters(), *model.buffers(), *states]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("out/methods"))
    parser.add_argument("--quick", action="store_true", help="two rounds with two rows, to check that the script runs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes, rounds = (m.Sizes(rows=2), 2) if given.quick else (m.Sizes(), 8)
    train, *_ = m.data(given.output, "reference", sizes)
    batch = next(runs.batches(train, sizes.rows, 0))
    work = {kind: contestant(kind, batch, rounds) for kind in KINDS}
    times = measure.interleave({kind: step for kind, (step, _, _) in work.items()}, rounds=rounds)
    found = {
        kind: {
            "seconds": times.median(kind),
            "over lora": times.over(kind, "lora"),
            "held bytes": held_bytes(model, optimizer),
            "peak bytes of a step": measure.peak_bytes(step),
        }
        for kind, (step, model, optimizer) in work.items()
    }
    folder = given.output / ("quick" if given.quick else "")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cost.json").write_text(json.dumps(found, indent=1) + "\n")
    print("| method | step, over LoRA's | CPU ms | MiB held | additional peak MiB in a step |\n|---|---|---|---|---|")
    for kind, row in found.items():
        mib = [row[key] / 2**20 for key in ("held bytes", "peak bytes of a step")]
        print(f"| {kind} | {row['over lora']:.2f} | {1000 * row['seconds']:.0f} | {mib[0]:.1f} | {mib[1]:.1f} |")


if __name__ == "__main__":
    main()
