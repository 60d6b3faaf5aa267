"""Compare LoRA, LoRA+, DoRA and AdaLoRA with equally many parameters, on dense and NF4 bases, and full fine-tuning.

The embedded model is trained on three tasks: `signatures` (a function's signature -> its argument names), `docstring`
(the same question -> the first word of its docstring) and `reference` (text). The learning rate of each dense method is
chosen from one grid by the loss on `valid` with a separate seed; its NF4 version uses the same rate. Runs with other
seeds are then scored on `test`; a seed determines the adapter's initial values and the order of the rows. A run is a
plain loop: AdamW, warm-up over a tenth of the steps, linear decay, gradients clipped to norm 1.

Runs whose figures are in the output folder are not repeated. `methods_report.py` makes the tables and plots.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import itertools
import json
import math
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import runs
import torch
from torch import nn

import reparam
from reparam.data.batches import Encoded
from reparam.data.encode import encode
from reparam.data.rows import read_rows
from reparam.hf.models import load_tokenizer
from reparam.inspect.geometry import geometry, of_update
from reparam.optim import lora_plus

ROOT = runs.ROOT
CHATS, TEXTS = ("signatures", "docstring"), ("reference",)
TASKS = CHATS + TEXTS
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # learning rates of AdamW to try for every method
RATIO = 16.0  # of LoRA+
TUNING = 100  # seed of the tuning runs
SEEDS = range(5)
R, ALPHA = 8, 16
METHODS = ("full", "lora", "lora_plus", "dora", "adalora", "qlora", "qlora_plus", "qdora", "qadalora")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers of steps, rows per batch, tokens per row and held-out rows."""

    steps: int = 60
    rows: int = 8
    length: int = 128
    held_out: int = 150


@dataclasses.dataclass(frozen=True)
class Job:
    """One training run."""

    task: str
    method: str
    rate: float
    seed: int

    @property
    def file(self) -> str:
        """Name of the file with its figures."""
        return f"{self.task}-{self.method}-{self.rate:g}-{self.seed}.json"


def method_of(name: str, seed: int) -> reparam.LoRA | reparam.AdaLoRA:
    """Configuration of a method by name. AdaLoRA's final budget equals rank R at every site."""
    kind = name.removeprefix("q")
    if kind == "dora":
        return reparam.DoRA(r=R, alpha=ALPHA, seed=seed)
    if kind == "adalora":
        return reparam.AdaLoRA(init_r=R * 3 // 2, target_r=R, alpha=ALPHA * 3 // 2, seed=seed)
    return reparam.LoRA(r=R, alpha=ALPHA, seed=seed)


@functools.cache
def data(folder: Path, task: str, sizes: Sizes) -> tuple[Encoded, Encoded, Encoded]:
    """Training rows, held-out rows for tuning, and held-out rows for the reported scores."""
    tokenizer = load_tokenizer(str(runs.BASE))
    place = ROOT / "assets/tasks" if (ROOT / "assets/tasks" / task).exists() else folder / "tasks"
    sides = (read_rows(str(place / task / f"{side}.jsonl")) for side in ("train", "valid", "test"))
    cut = (next(sides), *(rows[: sizes.held_out] for rows in sides))
    train, valid, test = (encode(rows, tokenizer, max_length=sizes.length) for rows in cut)
    return train, valid, test


def started(job: Job, steps: int) -> tuple[nn.Module, reparam.Adapter | None, torch.optim.Optimizer]:
    """Model, adapter (None for full fine-tuning) and optimizer of a job; the adapter is bound to the optimizer."""
    model = copy.deepcopy(runs.base("nf4" if job.method.startswith("q") else "dense"))
    if job.method == "full":
        model.requires_grad_()
        return model, None, torch.optim.AdamW(model.parameters(), lr=job.rate, weight_decay=0.0)
    adapter = reparam.attach(model, method_of(job.method, job.seed))
    groups: Iterable[Any] = adapter.parameters()
    if job.method.endswith("lora_plus"):
        groups = lora_plus(adapter.named_parameters(), adapter.sites, lr=job.rate, ratio=RATIO)
    optimizer = torch.optim.AdamW(groups, lr=job.rate, weight_decay=0.0)
    adapter.bind(optimizer, total_steps=steps)
    return model, adapter, optimizer


def moved(model: nn.Module, adapter: reparam.Adapter | None) -> list[tuple[str, float, float]]:
    """Path, ΔM and ΔD of every matrix that adapters change."""
    if adapter is not None:
        return [
            (path, *of_update(module.weight, adapter.updates[path].factors(module.weight)))
            for path, module in adapter.modules.items()
        ]
    before = dict(runs.base("dense").named_modules())
    return [
        (path, *geometry(before[path].weight, module.weight))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lm_head" not in path
    ]


def run(job: Job, folder: Path, sizes: Sizes, side: str) -> dict[str, Any]:
    """Train and score on `valid` or `test`, or read the figures if the job has been run."""
    return runs.kept(folder / "runs" / job.file, lambda: _run(job, folder, sizes, side))


def _run(job: Job, folder: Path, sizes: Sizes, side: str) -> dict[str, Any]:
    torch.manual_seed(job.seed)
    train, valid, test = data(folder, job.task, sizes)
    model, adapter, optimizer = started(job, sizes.steps)
    begun, halfway = time.perf_counter(), []

    def after(step: int) -> None:
        if step == sizes.steps // 2 and not job.method.startswith("q"):
            halfway.extend(moved(model, adapter))

    losses = runs.learn(model, optimizer, runs.batches(train, sizes.rows, job.seed), sizes.steps, after=after)
    found = {
        **dataclasses.asdict(job),
        "parameters": sum(p.numel() for group in optimizer.param_groups for p in group["params"]),
        side: runs.score(model, {"valid": valid, "test": test}[side]),
        "losses": losses,
        "moved": [halfway, moved(model, adapter)],
        "seconds": time.perf_counter() - begun,
    }
    if adapter is not None and hasattr(adapter.method, "init_r"):
        found["ranks"] = {path: update.factors(m.weight).A.shape[0] for (path, m), update in zip(
            adapter.modules.items(), adapter.updates.values(), strict=True)}  # fmt: skip
    return found


def held_out_loss(found: dict[str, Any]) -> float:
    """The loss on `valid` by which rates are chosen; infinite for a run that diverged to NaN."""
    value = next(iter(found["valid"].values()))
    return math.inf if math.isnan(value) else value


def best_rates(folder: Path, methods: Iterable[str]) -> dict[tuple[str, str], float]:
    """Learning rate with the lowest loss on `valid`, for each task and dense method, among the runs made so far."""
    best: dict[tuple[str, str], float] = {}
    for task, method in itertools.product(TASKS, methods):
        files = [folder / "runs" / Job(task, method, rate, TUNING).file for rate in RATES]
        runs = [json.loads(file.read_text()) for file in files if file.exists()]
        if runs:
            best[task, method] = min(runs, key=held_out_loss)["rate"]
    return best


def everything(jobs: list[Job], folder: Path, sizes: Sizes, side: str, workers: int) -> None:
    """Run the jobs that have no figures yet."""

    def line(job: Job, found: dict[str, Any]) -> str:
        shown = ", ".join(f"{key} {value:.4f}" for key, value in found[side].items())
        return f"{job.task} {job.method} rate {job.rate:g} seed {job.seed}: {shown} ({found['seconds']:.0f} s)"

    left = [job for job in jobs if not (folder / "runs" / job.file).exists()]
    runs.spread(left, functools.partial(run, folder=folder, sizes=sizes, side=side), workers, line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("out/methods"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--task", action="append", choices=TASKS, help="task to run; can be repeated; default: all")
    parser.add_argument("--quick", action="store_true", help="one seed, one rate and four steps, to check that it runs")
    given = parser.parse_args()
    sizes = Sizes(steps=4, rows=2, held_out=4) if given.quick else Sizes()
    seeds = SEEDS[:1] if given.quick else SEEDS
    folder = given.output.resolve() / ("quick" if given.quick else "")
    if not (folder / "tasks/docstring").exists():
        subprocess.run([*runs.SCRIPT, str(folder / "tasks"), "--task", "docstring"], check=True)
    dense = [method for method in METHODS if not method.startswith("q")]
    asked = given.task or list(TASKS)
    grid = RATES[:1] if given.quick else RATES
    tuning = [Job(task, method, rate, TUNING) for method in dense for task in asked for rate in grid]
    everything(tuning, folder, sizes, "valid", given.workers)
    best = best_rates(folder, dense)
    final = [
        Job(task, method, best[task, method.removeprefix("q")], seed)
        for seed in seeds
        for method in METHODS
        for task in asked
    ]
    everything(final, folder, sizes, "test", given.workers)
    print("\n    python benchmarks/methods.py && python benchmarks/methods_report.py")


if __name__ == "__main__":
    main()
