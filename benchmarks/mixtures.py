"""Mixtures of experts: what they cost over LoRA, and what they are for.

    python benchmarks/mixtures.py                      cost: steps, forwards and decoding over LoRA of the same ranks
    python benchmarks/mixtures.py --evidence out       quality on tasks that contradict each other; takes hours

Cost: N experts of rank 16 / N have the factors of one LoRA of rank 16; a mixture adds its gates.

Evidence: sibling tasks over the same signatures (`scripts/make_tasks.py`), whose questions do not say which task they
belong to. Plain LoRA has to answer all of them alike; a gate by the task does not; a gate by the token has nothing to
go by, and is the control. All have the same ranks in all. One LoRA for each task is what a gate has to come near.
Scores are exact matches on held-out rows, each with its 95 % interval over rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from pathlib import Path

import measure as m
import torch
from rich.console import Console
from torch import nn
from train_step import step_of

import reparam
from reparam.base import METHODS, Method
from reparam.train.config import BaseConfig, Config, DataConfig, OptimConfig, RunConfig
from reparam.train.evaluate import evaluate
from reparam.train.run import train
from reparam.train.show import Show

ROOT = Path(__file__).resolve().parents[1]
SIBLINGS = ("defaults", "count")
EXPERTS = (1, 4, 8, 16)


def contestants() -> dict[str, Method]:
    """Mixtures of the same ranks in all as LoRA of rank 16."""
    found: dict[str, Method] = {"lora": METHODS["lora"](r=m.RANK)}
    for n in EXPERTS:
        found[f"molora, N = {n}"] = METHODS["molora"](n=n, r=m.RANK // n)
    for n in EXPERTS[1:]:
        found[f"top-2, N = {n}"] = METHODS["mixture"](n=n, r=m.RANK // n, select="top_k", k=2, gate="renorm")
    found["top-1 of 8, rank 16 each"] = METHODS["mixture"](n=8, r=m.RANK, select="top_k")
    found["all of 8, rank 16 each"] = METHODS["mixture"](n=8, r=m.RANK)
    found["task_gated, N = 8"] = METHODS["task_gated"](n=8, r=m.RANK, dropout=0.0)
    found["hydralora, N = 4, rank 4"] = METHODS["hydralora"](n=4, r=4, dropout=0.0)
    found["mov, N = 10"] = METHODS["mov"](n=10)
    return found


def cost(*, quick: bool) -> None:
    """Print the table of times over our LoRA's."""
    base = m.llama(m.TINY if quick else m.LLAMA).train()
    models: dict[str, nn.Module] = {}
    for name, method in contestants().items():
        models[name] = m.twin(base)
        m.randomise(reparam.attach(models[name], method).parameters())
    ids = torch.randint(0, base.config.vocab_size, (2, 16) if quick else (4, 256))
    steps = m.interleave({name: step_of(model, ids) for name, model in models.items()}, rounds=2 if quick else 8)
    found = {f"training step {ids.shape[0]} x {ids.shape[1]}": steps}
    for tokens, rounds in ((512, 10), (1, 100)):
        work = {name: m.forward(model.eval(), 1, tokens) for name, model in models.items()}
        found[f"forward of {tokens}"] = m.interleave(work, rounds=2 if quick else rounds)
    print(f"### Mixtures over our LoRA of rank {m.RANK}\n\n| | {' | '.join(found)} |\n|---|{'---|' * len(found)}")
    for name in list(models)[1:]:
        print(f"| {name} | " + " | ".join(f"{times.over(name, 'lora'):.3f}" for times in found.values()) + " |")
    print("\n    python benchmarks/mixtures.py\n")


def evidence(folder: Path, *, quick: bool, seeds: int) -> None:
    """Train and score every contestant; what is in the folder already is not repeated."""
    data = folder / "tasks"
    if not (data / "train.jsonl").exists():
        options = [part for task in SIBLINGS for part in ("--task", task)]
        subprocess.run([sys.executable, ROOT / "scripts/make_tasks.py", data, *options], check=True)
        for side in ("train", "valid", "test"):
            parts = [(data / task / f"{side}.jsonl").read_text().splitlines() for task in SIBLINGS]
            rows = [line for pair in zip(*parts, strict=False) for line in pair]  # as many of each task
            (data / f"{side}.jsonl").write_text("\n".join(rows[:40] if quick else rows) + "\n")
    n = 4
    methods: dict[str, tuple[str, Method]] = {
        "lora": ("", METHODS["lora"](r=16)),
        "task_gated": ("", METHODS["task_gated"](n=n, r=16, dropout=0.0)),
        "poly": ("", METHODS["poly"](n=n, r=n)),
        "molora": ("", METHODS["molora"](n=n, r=16 // n)),
        "top-2": ("", METHODS["mixture"](n=n, r=16 // n, select="top_k", k=2, gate="renorm")),
        **{f"lora on {task} alone": (task, METHODS["lora"](r=16)) for task in SIBLINGS},
    }
    print(f"| method | {' | '.join(SIBLINGS)} | seeds |\n|---|{'---|' * len(SIBLINGS)}---|")
    for name, (own, method) in methods.items():
        scores = [_scores(folder, name, own, method, seed, quick=quick) for seed in range(seeds)]
        cells = [
            " ".join(f"{score[task][0]:.3f} ({score[task][1]:.3f} to {score[task][2]:.3f})" for score in scores)
            if not own or own == task
            else ""
            for task in SIBLINGS
        ]
        print(f"| {name} | " + " | ".join(cells) + f" | {seeds} |")
    print(f"\n    python benchmarks/mixtures.py --evidence {folder.name}\n")


def _scores(
    folder: Path, name: str, own: str, method: Method, seed: int, *, quick: bool
) -> dict[str, tuple[float, float, float]]:
    """Exact matches on the held-out rows of each task, with the ends of their intervals."""
    data, output = folder / "tasks", folder / f"{name.replace(' ', '-')}-{seed}"
    file = output / "scores.json"
    if file.exists():
        return json.loads(file.read_text())
    config = Config(
        base=BaseConfig(path=str(ROOT / "assets/tiny-python"), dtype="float32"),
        data=DataConfig(
            train=str(data / own / "train.jsonl"), valid=str(data / own / "valid.jsonl"), max_length=256, score_rows=1
        ),
        method=method,
        optim=OptimConfig(learning_rate=2e-3),
        run=RunConfig(
            output=str(output),
            epochs=2,
            max_steps=3 if quick else -1,
            batch_size=16,
            eval_every=10**6,
            save_every=10**6,
            resume=False,
            seed=seed,
        ),
    )
    train(config, show=Show(Console(quiet=True)))
    found = {}
    for task in (own,) if own else SIBLINGS:
        rows = (data / task / "test.jsonl").read_text().splitlines()
        part = output / f"{task}.jsonl"
        part.write_text("\n".join(rows[:20] if quick else rows) + "\n")
        scored = evaluate(part, None, str(output), dtype="float32", max_length=256, batch=16)
        assert scored.adapter is not None
        match = scored.adapter[1]
        found[task] = (match.value, match.low, match.high)
    file.write_text(json.dumps(found))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few rounds and steps, to see that it runs")
    parser.add_argument("--evidence", type=Path, help="folder for the runs of the evidence part")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the evidence part")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    if arguments.evidence is None:
        cost(quick=arguments.quick)
    else:
        evidence(arguments.evidence, quick=arguments.quick, seeds=1 if arguments.quick else arguments.seeds)


if __name__ == "__main__":
    main()
