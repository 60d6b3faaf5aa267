"""VoRA on scenes of handwritten digits: what distillation, the image mask, and rows of text are worth.

A word-level Llama (6 blocks of width 96) is pretrained on sentences about numbers. It learns to see under several
conditions, with the same rows in the same order for one seed. Each condition's learning rate is chosen by the loss of
answers on `valid` after half of the steps, with a seed of its own; other ranks and numbers of blocks have VoRA's rate.
Every finished run is kept in the file of results, and is not repeated.

The loss of rows with images counts the words that the image decides, numbers and answers, and not the words that all
captions share: with those, the sight of a digit was a tenth of the loss, and VoRA did not begin to see in 150 steps.

    python benchmarks/vora.py --seeds 3    # about two hours on one CPU core; needs scikit-learn
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from vora_models import BLOCKS, DEPTH, VISION, WIDTH, Connector, batch, language, teacher
from vora_scenes import APART, CAPTION, MIXED, Scene, scenes, texts

from reparam import Full, LoRA
from reparam.vision import Teacher, VoRA

RESULTS = Path(__file__).resolve().parents[1] / "docs/vora.json"
TUNING = 100
STEPS, ROWS, PER_STEP, WARM = 600, 6000, 36, 30
MARK = 1.0
"""Nats of a caption on `valid`; one that does not see the digit has 2.3."""


@dataclasses.dataclass(frozen=True)
class Condition:
    """One way to learn to see, and the learning rates to choose from; without any, VoRA's is taken."""

    rates: tuple[float, ...] = (3e-3, 6e-3)
    distills: bool = True
    mask: str = "image"
    blocks: int = BLOCKS
    rank: int = 28
    whole: bool = False
    text: float = 0.17
    connector: bool = False


CONDITIONS = {
    "VoRA": Condition(),
    "no distillation": Condition(distills=False),
    "causal mask": Condition(mask="causal"),
    "no text rows": Condition(text=0.0),
    "whole model": Condition(rates=(1e-3, 3e-3), whole=True, distills=False),
    "whole model, no text rows": Condition(rates=(1e-3, 3e-3), whole=True, distills=False, text=0.0),
    "encoder and connector": Condition(rates=(3e-3, 1e-2), connector=True, distills=False, mask="causal"),
    "first 2 blocks": Condition(rates=(), blocks=2),
    "all 6 blocks": Condition(rates=(), blocks=6),
    "rank 4": Condition(rates=(), rank=4),
    "rank 12": Condition(rates=(), rank=12),
}


def made(base: torch.nn.Module, vit: Teacher, how: Condition, seed: int) -> VoRA:
    """A model before it learns to see."""
    method = None if how.connector else Full() if how.whole else LoRA(r=how.rank, scaling="none", seed=seed)
    blocks = DEPTH if how.whole else how.blocks
    model = copy.deepcopy(base)
    vora = VoRA(model, vision=VISION, blocks=blocks, method=method, mask=how.mask, seed=seed)  # type: ignore[arg-type]
    if how.connector:
        model.requires_grad_(False)
        equal = sum(p.numel() for p in made(base, vit, Condition(distills=False), seed).trained().values())
        torch.manual_seed(seed)
        vora.embedding = Connector(vit, round((equal - WIDTH) / (48 + 1 + WIDTH)))  # type: ignore[assignment]
    if how.distills:
        pairs = [(number, number) for number in range(1, min(blocks, BLOCKS) + 1)]
        vora.distill(vit, seed=seed, pairs=pairs)
    return vora


@torch.no_grad()
def answers(vora: VoRA, rows: list[Scene]) -> tuple[list[bool], float]:
    """For each row, whether its whole answer is the likeliest, token by token; and the mean nats of an answer."""
    vora.eval()
    found: list[bool] = []
    nats = 0.0
    for start in range(0, len(rows), 64):
        given = batch(rows[start : start + 64])
        labels = given.pop("labels")[:, 1:]
        logits = vora(**given).logits[:, :-1]
        found += ((logits.argmax(-1) == labels) | (labels == -100)).all(1).tolist()
        nats += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
    return found, nats / len(rows)


@torch.no_grad()
def bits_per_byte(vora: VoRA, sentences: list[str]) -> float:
    """Bits for each byte of sentences, without their first word, which nothing precedes."""
    vora.eval()
    given = batch(sentences)
    labels = given.pop("labels")[:, 1:].masked_fill(given["attention_mask"][:, 1:] == 0, -100)
    logits = vora(**given).logits[:, :-1]
    nats = float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
    return nats / math.log(2) / sum(len(text) - len(text.split()[0]) for text in sentences)


def learn(base: torch.nn.Module, vit: Teacher, how: Condition, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """Learn to see, and measure."""
    vora = made(base, vit, how, seed)
    rows, draw, spoken = scenes("train", ROWS, seed), random.Random(seed), texts(4000, 0, MIXED)
    valid, test = scenes("valid", 240, 0), scenes("test", 720, 0)
    captions = [row for row in valid if row.prompt == CAPTION]
    sentences = {"mixed": texts(256, 999, MIXED), "apart": texts(256, 999, APART)}
    before = {name: bits_per_byte(vora, of) for name, of in sentences.items()}
    parameters = list(vora.trained().values())
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM))
    curve = [(0, answers(vora, captions)[1])]
    seconds = 0.0
    for step in range(1, steps + 1):
        began = time.process_time()
        count = round(PER_STEP * how.text)
        given = batch([*draw.sample(rows, PER_STEP - count), *draw.sample(spoken, count)])
        loss = vora.train()(**given).loss
        extra = vora.distillation.total() if vora.distillation is not None else None
        (loss if extra is None else loss + extra).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds += time.process_time() - began
        if step % 10 == 0:
            curve.append((step, answers(vora, captions)[1]))
    heads = sum(p.numel() for p in vora.distillation.parameters()) if vora.distillation is not None else 0
    found: dict[str, Any] = {
        "valid nats": answers(vora, valid)[1],
        "curve": [(step, round(nats, 4)) for step, nats in curve],
        "CPU s of a step": seconds / steps,
        "trained parameters": sum(p.numel() for p in parameters) - heads,
        "parameters of heads": heads,
        "text before": before,
        "text after": {name: bits_per_byte(vora, of) for name, of in sentences.items()},
    }
    right, nats = answers(vora, test)
    kinds: dict[str, list[bool]] = {}
    for row, one in zip(test, right, strict=True):
        kinds.setdefault(row.prompt, []).append(one)
    found |= {"accuracy": sum(right) / len(right), "nats": nats}
    found["by kind"] = {kind: sum(each) / len(each) for kind, each in kinds.items()}
    if vora.adapter is not None:
        found["merged"] = _merged(vora, test[:64])
    kept = sum(p.numel() for p in vora.parameters()) - sum(p.numel() for p in base.parameters())
    found["added parameters"] = kept + (sum(p.numel() for p in vit.model.parameters()) if how.connector else 0)
    return found


@torch.no_grad()
def _merged(vora: VoRA, rows: list[Scene]) -> dict[str, float]:
    """The largest difference of logits after the merge, and the share of positions with the same likeliest token."""
    vora.distill(None)
    given = batch(rows)

    def logits() -> Tensor:
        return torch.as_tensor(vora.eval()(**given).logits)

    apart = logits()
    vora.merge()
    merged = logits()
    same = (merged.argmax(-1) == apart.argmax(-1))[given["attention_mask"] > 0]
    return {"difference": float((merged - apart).abs().max()), "same": float(same.float().mean())}


def write(found: dict[str, Any], file: Path) -> None:
    """Write the results at once, so that a killed run loses one cell."""
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps(found, separators=(",", ":")).replace('},"', '},\n"') + "\n", encoding="utf-8")
    os.replace(beside, file)


def main() -> None:
    """Run what is missing of the conditions, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--models", type=Path, default=Path("out/vora-benchmark"), help="folder of the trained models")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", nargs="*", default=list(CONDITIONS))
    sizes = parser.parse_args()
    torch.set_num_threads(1)
    base, (vit, share) = language(sizes.models), teacher(sizes.models)
    found: dict[str, Any] = json.loads(sizes.out.read_text()) if sizes.out.exists() else {}
    if found.get("steps", sizes.steps) != sizes.steps:
        parser.error(f"{sizes.out} has runs of {found['steps']} steps; choose another --out")
    found |= {"teacher": share, "steps": sizes.steps}
    cells: dict[str, Any] = found.setdefault("cells", {})
    for seed in [TUNING, *range(sizes.seeds)]:
        for name in sizes.only:
            how = CONDITIONS[name]
            for rate in how.rates if seed == TUNING else (chosen(cells, name),):
                key = f"{name} | {rate:g} | {seed}"
                if key not in cells:
                    steps = sizes.steps // 2 if seed == TUNING else sizes.steps
                    cells[key] = learn(base, vit, how, rate, seed, steps)
                    write(found, sizes.out)
                    told = {part: cells[key][part] for part in ("accuracy", "nats", "text after", "CPU s of a step")}
                    print(time.strftime("%H:%M:%S"), key, told, flush=True)


def chosen(cells: dict[str, Any], name: str) -> float:
    """The learning rate with the lowest loss of answers on `valid`."""
    tuned = name if CONDITIONS[name].rates else "VoRA"
    losses = {rate: cells[f"{tuned} | {rate:g} | {TUNING}"]["valid nats"] for rate in CONDITIONS[tuned].rates}
    return min(losses, key=lambda rate: losses[rate])


if __name__ == "__main__":
    main()
