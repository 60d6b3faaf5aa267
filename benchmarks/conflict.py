"""Compare the mixture presets with LoRA of about equal size on tasks that contradict each other.

    python benchmarks/conflict.py

Three tasks over the same signatures (`scripts/make_tasks.py`) have the same questions, which do not name the task; the
answer is the arguments' names, their defaults, or their number. LoRA cannot tell the tasks apart. Mixtures with a gate
per task can. Mixtures with a gate per token or prompt cannot either, and serve as controls. Two references show what
a good gate should approach: a LoRA with the task's name in the question, and a separate LoRA for each task.

Each contestant's learning rate is chosen from one grid by the loss on `valid` with a separate seed. Runs with five
other seeds are scored on `test`; a seed determines the initial values and the order of the rows. All contestants train
on equally many rows, so each separate LoRA has a third of the steps. These LoRAs are the experts of `mole` and `xlora`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import math
import subprocess
import time
from pathlib import Path
from typing import Any

import runs
import torch
from torch import nn

import reparam
from reparam.adapter.context import tasks_of
from reparam.core.method import Method
from reparam.core.registry import METHODS
from reparam.data.batches import Encoded
from reparam.data.encode import encode
from reparam.data.row import Row
from reparam.data.rows import read_rows
from reparam.hf.models import load_tokenizer

TASKS = ("count", "defaults", "signatures")  # in the order of their task ids
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
TUNING = 100
SEEDS = range(5)
R = 16  # total rank of all experts
CONTESTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("lora", {"r": R, "alpha": 2.0 * R}),
    "task_gated": ("task_gated", {"n": 4, "r": R, "alpha": 2.0 * R, "dropout": 0.0}),
    "poly": ("poly", {"n": 4, "r": R // 4, "alpha": 8.0}),
    "mov": ("mov", {"n": 10}),
    "molora": ("molora", {"n": 4, "r": R // 4, "alpha": 8.0}),
    "llava_mole": ("llava_mole", {"n": 3, "r": 6, "alpha": 12.0, "dropout": 0.0}),
    "moelora_contrastive": ("moelora_contrastive", {"n": 4, "r": R // 4, "alpha": 8.0}),
    "loramoe": ("loramoe", {"n": 4, "r": R // 4, "alpha": 8.0, "dropout": 0.0, "losses": {"loramoe_blc": 0.01}}),
    "hydralora": ("hydralora", {"n": 4, "r": 6, "alpha": 12.0, "dropout": 0.0}),
    "LoRA, told the task": ("lora", {"r": R, "alpha": 2.0 * R}),
    "LoRA for each task": ("lora", {"r": R, "alpha": 2.0 * R}),
    "mole": ("mole", {}),
    "xlora": ("xlora", {}),
}
OWN, TOLD, FINISHED = "LoRA for each task", "LoRA, told the task", ("mole", "xlora")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers of steps, rows per batch, tokens per row and held-out rows."""

    steps: int = 90
    rows: int = 9
    length: int = 128
    held_out: int = 100  # rows of each task


@dataclasses.dataclass(frozen=True)
class Job:
    """One training run."""

    name: str
    rate: float
    seed: int

    def folder(self, output: Path) -> Path:
        """Folder of the run's figures and adapters."""
        return output / "conflict" / f"{self.name.replace(', ', '-').replace(' ', '-')}-{self.rate:g}-{self.seed}"


@functools.cache
def data(output: Path, side: str, sizes: Sizes, *, told: bool = False) -> dict[str, Encoded]:
    """Encoded rows of each task; for training, the key "" has the rows of all tasks in turns."""
    found: dict[str, list[Row]] = {}
    for task in TASKS:
        rows = read_rows(str(output / "tasks" / task / f"{side}.jsonl"))
        found[task] = [_told(row, task) if told else row for row in rows]
    if side == "train":
        least = min(map(len, found.values()))
        found = {task: rows[:least] for task, rows in found.items()}
        found[""] = [row for several in zip(*found.values(), strict=True) for row in several]
    else:
        found = {task: rows[: sizes.held_out] for task, rows in found.items()}
    tokenizer = load_tokenizer(str(runs.BASE))
    return {name: encode(rows, tokenizer, max_length=sizes.length, tasks=TASKS) for name, rows in found.items()}


def _told(row: Row, task: str) -> Row:
    """The row with the name of its task before the question."""
    question, *rest = row.messages
    return dataclasses.replace(row, messages=({**question, "content": f"{task}: {question['content']}"}, *rest))


def method_of(job: Job, output: Path) -> Method:
    """Configuration of the contestant's method."""
    name, settings = CONTESTANTS[job.name]
    if job.name == "task_gated" or job.name == "poly":
        settings = {**settings, "tasks": TASKS}
    if job.name in FINISHED:
        own = best(output, OWN)
        seed = job.seed if job.seed in SEEDS else SEEDS[0]
        settings = {"experts": tuple(str(Job(OWN, own, seed).folder(output) / task) for task in TASKS)}
    return METHODS[name](**settings, seed=job.seed)


def run(job: Job, output: Path, sizes: Sizes) -> dict[str, Any]:
    """Train and score on `valid` or `test`, or read the figures if the job has been run."""
    return runs.kept(job.folder(output) / "figures.json", lambda: _run(job, output, sizes))


def _run(job: Job, output: Path, sizes: Sizes) -> dict[str, Any]:
    side = "valid" if job.seed == TUNING else "test"
    told = job.name == TOLD
    train, held_out = (data(output, which, sizes, told=told) for which in ("train", side))
    begun = time.perf_counter()
    found: dict[str, Any] = {"parameters": 0, "losses": [], "scores": {}}
    for task in TASKS if job.name == OWN else ("",):
        torch.manual_seed(job.seed)
        model = copy.deepcopy(runs.base())
        adapter = reparam.attach(model, method_of(job, output))
        steps = sizes.steps // len(TASKS) if task else sizes.steps
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=job.rate, weight_decay=0.0)
        adapter.bind(optimizer, total_steps=steps)
        found["losses"] += runs.learn(model, optimizer, _batches(model, train[task], sizes, job.seed), steps)
        found["parameters"] += sum(p.numel() for p in adapter.parameters())
        found["scores"] |= {name: runs.score(model, held_out[name]) for name in ((task,) if task else TASKS)}
        if task:
            adapter.save(job.folder(output) / task)
    return {**dataclasses.asdict(job), **found, "seconds": time.perf_counter() - begun}


def _batches(model: nn.Module, train: Encoded, sizes: Sizes, seed: int) -> Any:
    """Batches with task ids only if the model uses them."""
    by_task = bool(tasks_of(model))
    for batch in runs.batches(train, sizes.rows, seed):
        yield {key: value for key, value in batch.items() if by_task or key != "task"}


def mean_loss(figures: dict[str, Any]) -> float:
    """Mean over the tasks of nats per answer token; infinite for a run that diverged to NaN."""
    value = sum(score["loss"] for score in figures["scores"].values()) / len(TASKS)
    return math.inf if math.isnan(value) else value


def best(output: Path, name: str) -> float:
    """Learning rate with the lowest loss on `valid` among the runs made so far."""
    files = [Job(name, rate, TUNING).folder(output) / "figures.json" for rate in RATES]
    return min((json.loads(file.read_text()) for file in files if file.exists()), key=mean_loss)["rate"]


def table(output: Path, names: list[str], seeds: range) -> str:
    """Markdown table of the scores by contestant, and the differences to LoRA, paired by seed."""
    lines = [
        "| method | rate | parameters | nats per answer token | difference to LoRA | "
        + " | ".join(f"{task}, exact" for task in TASKS)
        + " |",
        "|---|---|---|---|---|" + "---|" * len(TASKS),
    ]
    reference: list[float] = []
    for name in names:
        rate = best(output, name)
        found = [json.loads((Job(name, rate, seed).folder(output) / "figures.json").read_text()) for seed in seeds]
        losses = [mean_loss(figures) for figures in found]
        reference = reference or losses
        apart = [a - b for a, b in zip(losses, reference, strict=True)]
        exact = [_cell([f["scores"][task]["exact"] for f in found], "") for task in TASKS]
        less = _cell(apart, "+") if name != names[0] else ""
        lines.append(
            f"| {name} | {rate:g} | {found[0]['parameters']:,} | {_cell(losses, '')} | {less} | {' | '.join(exact)} |"
        )
    return "\n".join(lines)


def _cell(values: list[float], sign: str) -> str:
    mean, half = runs.interval(values)
    return f"{mean:{sign}.3f} ± {half:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/mixtures"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one rate, two seeds, three steps, to check that it runs")
    given = parser.parse_args()
    output = given.output.resolve() / ("quick" if given.quick else "")
    sizes = Sizes(steps=3, rows=3, held_out=3) if given.quick else Sizes()
    seeds, rates = (SEEDS[:2], RATES[:1]) if given.quick else (SEEDS, RATES)
    if not all((output / "tasks" / task).exists() for task in TASKS):
        options = [part for task in TASKS for part in ("--task", task)]
        subprocess.run([*runs.SCRIPT, str(output / "tasks"), *options], check=True)
    work = functools.partial(run, output=output, sizes=sizes)
    first = [name for name in CONTESTANTS if name not in FINISHED]
    for names in (first, list(FINISHED)):  # the first group trains the experts of the second
        runs.spread([Job(name, rate, TUNING) for name in names for rate in rates], work, given.workers, _line)
        jobs = [Job(name, best(output, name), seed) for seed in seeds for name in names]
        runs.spread(jobs, work, given.workers, _line)
    print(table(output, list(CONTESTANTS), seeds))
    print("\n    python benchmarks/conflict.py")


def _line(job: Job, found: dict[str, Any]) -> str:
    scores = ", ".join(f"{task} {score['loss']:.3f} {score['exact']:.2f}" for task, score in found["scores"].items())
    return f"{job.name}, rate {job.rate:g}, seed {job.seed}: {scores} ({found['seconds']:.0f} s)"


if __name__ == "__main__":
    main()
