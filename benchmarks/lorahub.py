"""Compare LoraHub with four alternatives on tasks for which no adapter was trained.

    python benchmarks/lorahub.py

First, an adapter is trained for each of five tasks over signatures (`scripts/make_tasks.py`). Then, on each new task,
five ways are compared: the base without an adapter (zero-shot), the mean of the adapters, the best single adapter,
LoraHub's search on a few examples, and a LoRA trained on the same examples. The new tasks are `camel` (the function's
name in CamelCase), `docstring` (the first word of its docstring) and `combined` (the number of arguments, then their
names), which combines two of the five tasks.

Each of five seeds draws its own few examples. The learning rate and the number of steps of the LoRA on few examples are
chosen on `valid` with a separate seed, an advantage that LoraHub does not get. Scores are on 150 held-out rows of
`test`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import runs
import torch
from rich.console import Console
from torch import nn

import reparam
from reparam.data.batches import Encoded
from reparam.data.encode import encode
from reparam.data.rows import read_rows
from reparam.hf.models import load_tokenizer
from reparam.recipes.compose import compose_to
from reparam.recipes.lorahub import search_to

KNOWN = ("signatures", "defaults", "annotations", "call", "count")
PARTS = ("count", "signatures")  # the two tasks in "combined"
HELD_OUT = ("camel", "docstring", "combined")
WAYS = ("zero-shot", "mean", "best single", "LoraHub", "LoRA on the same examples")
RATES, STEPS = (3e-4, 1e-3, 3e-3, 1e-2), (20, 60)  # of the LoRA on few examples
TUNING = 100
SEEDS = range(5)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers of steps, rows, candidates and tokens."""

    steps: int = 120  # of training the adapters that are combined
    rows: int = 8
    few: int = 16
    budget: int = 40
    length: int = 128
    held_out: int = 150


@dataclasses.dataclass(frozen=True)
class Job:
    """One way on one task with the few examples of a seed; the way "adapter" trains one of the combined adapters."""

    task: str
    way: str
    seed: int
    rate: float = 3e-3
    steps: int = 0

    def folder(self, output: Path) -> Path:
        """Folder of the job's figures and adapter."""
        few = f"-{self.rate:g}-{self.steps}" if self.way == WAYS[-1] else ""
        return output / "lorahub" / f"{self.task}-{self.way.replace(' ', '-')}{few}-{self.seed}"


def tasks(output: Path) -> None:
    """Write the rows of all tasks; "combined" has the functions for which both of its parts have a row."""
    folder = output / "lorahub-tasks"
    if (folder / "combined").exists():
        return
    options = [part for task in {*KNOWN, *HELD_OUT} - {"combined"} for part in ("--task", task)]
    subprocess.run([*runs.SCRIPT, str(folder), *options], check=True, stdout=subprocess.DEVNULL)
    (folder / "combined").mkdir()
    for side in ("train", "valid", "test"):
        read = [
            {row["source"]: row for row in map(json.loads, (folder / part / f"{side}.jsonl").read_text().splitlines())}
            for part in PARTS
        ]
        lines = []
        for source in sorted(set(read[0]) & set(read[1]), key=list(read[0]).index):
            question, _ = read[0][source]["messages"]
            answer = ": ".join(part[source]["messages"][1]["content"] for part in read)
            lines.append(json.dumps({"messages": [question, {"role": "assistant", "content": answer}]}) + "\n")
        (folder / "combined" / f"{side}.jsonl").write_text("".join(lines))


def few_rows(output: Path, task: str, seed: int, sizes: Sizes) -> Path:
    """Write a file with the few examples that a seed draws, and return its path."""
    file = output / "lorahub" / f"{task}-{seed}.jsonl"
    lines = (output / "lorahub-tasks" / task / "train.jsonl").read_text().splitlines(keepends=True)
    draw = torch.randperm(len(lines), generator=torch.Generator().manual_seed(seed))[: sizes.few]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(lines[i] for i in draw.tolist()))
    return file


@functools.cache
def encoded(file: Path, most: int, length: int) -> Encoded:
    """The first `most` rows of a file, encoded to at most `length` tokens each."""
    return encode(read_rows(str(file))[:most], load_tokenizer(str(runs.BASE)), max_length=length)


def run(job: Job, output: Path, sizes: Sizes) -> dict[str, Any]:
    """Run the job and score it, or read its figures if it has been run."""
    return runs.kept(job.folder(output) / "figures.json", lambda: _run(job, output, sizes))


def _run(job: Job, output: Path, sizes: Sizes) -> dict[str, Any]:
    begun, console, folder = time.perf_counter(), Console(quiet=True), job.folder(output)
    known = [str(Job(task, "adapter", 0).folder(output) / "adapter") for task in KNOWN]
    found: dict[str, Any] = dataclasses.asdict(job)
    model = copy.deepcopy(runs.base())
    if job.way == "adapter":
        train = encoded(output / "lorahub-tasks" / job.task / "train.jsonl", 5000, sizes.length)
        trained(model, train, job.rate, sizes.steps, sizes.rows, job.seed).save(folder / "adapter")
    elif job.way == "mean":
        compose_to(folder / "adapter", known, None, overwrite=True, console=console)
        reparam.load(model, folder / "adapter")
    elif job.way == "LoraHub":
        few = few_rows(output, job.task, job.seed, sizes)
        hub = search_to(
            folder / "adapter",
            known,
            few,
            budget=sizes.budget,
            max_length=sizes.length,
            overwrite=True,
            console=console,
        )
        found |= {"weights": list(hub.found.weights), "forwards": hub.forwards, "candidates": len(hub.found.history)}
        found |= {"few": {line.name.split(" (")[0]: line.few for line in hub.lines}}
        single = hub.line("best single")
        found |= {"best": KNOWN[single.weights.index(1.0)]}
        reparam.load(model, folder / "adapter")
    elif job.way == "best single":
        best = run(dataclasses.replace(job, way="LoraHub"), output, sizes)["best"]
        reparam.load(model, Job(best, "adapter", 0).folder(output) / "adapter")
    elif job.way == WAYS[-1]:
        few = few_rows(output, job.task, job.seed, sizes)
        trained(model, encoded(few, sizes.few, sizes.length), job.rate, job.steps, sizes.rows, job.seed)
    side = "valid" if job.seed == TUNING else "test"
    held_out = encoded(output / "lorahub-tasks" / job.task / f"{side}.jsonl", sizes.held_out, sizes.length)
    return {**found, "score": runs.score(model, held_out), "seconds": time.perf_counter() - begun}


def trained(model: nn.Module, rows: Encoded, rate: float, steps: int, batch: int, seed: int) -> reparam.Adapter:
    """Train a LoRA of rank 8 on these rows."""
    torch.manual_seed(seed)
    adapter = reparam.attach(model, reparam.LoRA(r=8, alpha=16, seed=seed))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=rate, weight_decay=0.0)
    runs.learn(model, optimizer, runs.batches(rows, batch, seed), steps)
    model.eval()
    return adapter


def jobs_of(task: str, output: Path, seeds: range) -> list[Job]:
    """The jobs of all ways on a task, for all seeds; the few-example LoRA uses the tuned rate and steps."""
    tried = [Job(task, WAYS[-1], TUNING, rate, steps) for rate in RATES for steps in STEPS]
    done = [json.loads(f.read_text()) for job in tried if (f := job.folder(output) / "figures.json").exists()]
    best = min(done, key=lambda figures: figures["score"]["loss"])
    few = [Job(task, WAYS[-1], seed, best["rate"], best["steps"]) for seed in seeds]
    hub = [Job(task, way, seed) for way in ("LoraHub", "best single") for seed in seeds]
    return [Job(task, "zero-shot", 0), Job(task, "mean", 0), *hub, *few]


def table(output: Path, seeds: range) -> str:
    """Markdown table of the scores by task and way, and the differences to LoraHub, paired by seed."""
    lines = ["| task | method | nats per answer token | difference to LoraHub | exact match |", "|---|---|---|---|---|"]
    for task in HELD_OUT:
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for job in jobs_of(task, output, seeds):
            found[job.way].append(json.loads((job.folder(output) / "figures.json").read_text()))
        hub = [figures["score"]["loss"] for figures in found["LoraHub"]]
        for way in WAYS:
            several = found[way] * (len(hub) if len(found[way]) == 1 else 1)  # does not depend on the seed
            losses, exact = ([figures["score"][key] for figures in several] for key in ("loss", "exact"))
            less = _cell([a - b for a, b in zip(losses, hub, strict=True)], "+") if way != "LoraHub" else ""
            lines.append(f"| {task} | {way} | {_cell(losses)} | {less} | {_cell(exact)} |")
    return "\n".join(lines)


def _cell(values: list[float], sign: str = "") -> str:
    mean, half = runs.interval(values)
    return f"{mean:{sign}.3f}" + (f" ± {half:.3f}" if half > 0 else "")


def _line(job: Job, found: dict[str, Any]) -> str:
    weights = " ".join(f"{w:+.2f}" for w in found.get("weights", ()))
    score = f"{found['score']['loss']:.3f} {found['score']['exact']:.2f}"
    return f"{job.task}, {job.way}, seed {job.seed}: {score} {weights} ({found['seconds']:.0f} s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/mixtures"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="two seeds and few steps, to check that the script runs")
    given = parser.parse_args()
    output = given.output.resolve() / ("quick" if given.quick else "")
    sizes = Sizes(steps=3, rows=2, few=2, budget=7, held_out=3) if given.quick else Sizes()
    seeds = SEEDS[:2] if given.quick else SEEDS
    tasks(output)
    work = functools.partial(run, output=output, sizes=sizes)
    tried = [Job(task, WAYS[-1], TUNING, rate, steps) for task in HELD_OUT for rate in RATES for steps in STEPS]
    runs.spread([*(Job(task, "adapter", 0) for task in KNOWN), *tried], work, given.workers, _line)
    runs.spread([job for task in HELD_OUT for job in jobs_of(task, output, seeds)], work, given.workers, _line)
    print(table(output, seeds))
    print("\n    python benchmarks/lorahub.py")


if __name__ == "__main__":
    main()
