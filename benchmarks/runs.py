"""Run many short trainings of the embedded model: a plain training loop, scores, and one file of figures per run."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import math
import multiprocessing
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import reparam
from reparam.adapter.context import told
from reparam.compare import statistics
from reparam.data.batches import Collator, Encoded, padding_id
from reparam.evaluation.score import token_losses
from reparam.hf.models import load_base, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "assets/tiny-python"
SCRIPT = [sys.executable, str(ROOT / "scripts/make_tasks.py")]
_Job = TypeVar("_Job")


@functools.cache
def base(storage: str = "dense") -> nn.Module:
    """The embedded model in this storage, in eval mode; cached, so copy it before changing it."""
    model = load_base(str(BASE), dtype="float32")
    if storage != "dense":
        reparam.quantize(model, storage)
    return model.eval()


def batches(train: Encoded, rows: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Endless padded batches of `rows` rows, shuffled anew in each epoch with the seed."""
    order = list(range(len(train)))
    draw = random.Random(seed)
    queue: list[int] = []
    while True:
        if len(queue) < rows:
            draw.shuffle(order)
            queue += order
        chosen, queue = queue[:rows], queue[rows:]
        yield collated(train, chosen)


def collated(encoded: Encoded, chosen: Iterable[int]) -> dict[str, Tensor]:
    """The model's inputs for the chosen rows, padded."""
    made = Collator(padding_id(load_tokenizer(str(BASE))))([encoded[i] for i in chosen])
    return {key: made[key] for key in ("input_ids", "attention_mask", "labels", "task") if key in made}


def learn(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Iterator[dict[str, Tensor]],
    steps: int,
    *,
    after: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Train and return the loss of each step.

    The learning rate rises over the first tenth of the steps, then falls linearly. Gradients are clipped to norm 1.
    """
    own = [p for group in optimizer.param_groups for p in group["params"]]
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / warm, (steps - t) / max(1, steps - warm))
    )
    losses = []
    model.train()
    for step, batch in zip(range(1, steps + 1), data, strict=False):
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        after(step)
    return losses


def score(model: nn.Module, encoded: Encoded) -> dict[str, float]:
    """Score held-out rows: bits per byte for texts; for answers, nats per token and the share of exact matches."""
    nats, tokens = token_losses(model, encoded, load_tokenizer(str(BASE)), batch=16)
    size = float(encoded.text_bytes.sum())
    if size:
        return {"bits": float(nats.sum()) / size / math.log(2)}
    return {"loss": float(nats.sum() / tokens.sum()), "exact": exact(model, encoded)}


@torch.no_grad()
def exact(model: nn.Module, encoded: Encoded) -> float:
    """Share of rows in which each answer token is the most likely one given those before it, as in greedy decoding."""
    collate = Collator(padding_id(load_tokenizer(str(BASE))))
    model.eval()
    right = 0
    for start in range(0, len(encoded), 16):
        made = collate([encoded[i] for i in range(start, min(start + 16, len(encoded)))])
        labels = made["labels"][:, 1:]
        with told(model, made) if reparam.adapters(model) else torch.no_grad():
            logits = model(input_ids=made["input_ids"], attention_mask=made["attention_mask"]).logits[:, :-1]
        right += int(((logits.argmax(-1) == labels) | (labels == -100)).all(1).sum())
    return right / len(encoded)


def kept(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Read the figures in a JSON file; if it does not exist, compute them with `make` and write the file atomically."""
    if file.exists():
        return json.loads(file.read_text())
    found = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.replace(file)
    return found


def spread(
    jobs: Sequence[_Job],
    work: Callable[[_Job], dict[str, Any]],
    workers: int,
    line: Callable[[_Job, dict[str, Any]], str],
) -> list[dict[str, Any]]:
    """Run the jobs in `workers` processes with one thread each; print a line for each job."""
    context = multiprocessing.get_context("spawn")
    found = []
    with concurrent.futures.ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        for job, figures in zip(jobs, pool.map(work, jobs), strict=True):
            found.append(figures)
            print(f"{len(found)}/{len(jobs)} {line(job, figures)}", flush=True)
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the length of Student's 95 % interval, which is NaN for a single value."""
    found = statistics.interval(values)
    return found.mean, math.nan if found.half is None else found.half
