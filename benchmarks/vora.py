"""VoRA on scenes of handwritten digits: what distillation, the image mask, and rows of text are worth.

A word-level Llama (6 blocks of width 96) is pretrained on sentences about numbers. It learns to see under several
conditions, with the same rows in the same order for one seed; each condition's learning rate is chosen by the accuracy
on `valid` with a seed of its own. Reported: right answers on `test`, the loss of text that is not in the mix before and
after, the steps until the loss of captions on `valid` is below a mark, parameters, and seconds of a step, as means with
95 % intervals (Student's t) over seeds. Differences are paired by seed; where an interval holds 0, the benchmark does
not show a difference.

    python benchmarks/vora.py --out benchmarks/results/vora.json        # needs scikit-learn
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel
from vora_scenes import IDS, PIXELS, WORDS, Scene, digits, ids, scenes, texts

from reparam import Full, LoRA
from reparam.vision import Teacher, Vision, VoRA

BLOCKS, WIDTH, RANK, PATCH = 4, 96, 28, 4
VISION = Vision(patch=PATCH, size=PIXELS, width=48, channels=1, mean=(0.3,), std=(0.35,))
TOKENS = VISION.side**2
PAD, END = IDS["<pad>"], IDS["<end>"]
RATES = (1e-3, 3e-3)
TUNING = 100
MARK = 1.0  # nats per token of captions


@dataclasses.dataclass(frozen=True)
class Condition:
    """One way to learn to see."""

    distills: bool = True
    mask: str = "image"
    blocks: int = BLOCKS
    rank: int = RANK
    whole: bool = False
    text: float = 0.17
    connector: bool = False


CONDITIONS = {
    "VoRA": Condition(),
    "no distillation": Condition(distills=False),
    "causal mask": Condition(mask="causal"),
    "no text rows": Condition(text=0.0),
    "all blocks": Condition(blocks=6, distills=False),
    "rank 4": Condition(rank=4),
    "whole model": Condition(whole=True, distills=False),
    "whole model, no text rows": Condition(whole=True, distills=False, text=0.0),
    "encoder and connector": Condition(connector=True, distills=False, mask="causal"),
}


class Connector(nn.Module):
    """The baseline: the last states of the teacher, and a trained map to the width of the model."""

    def __init__(self, teacher: Teacher, width: int) -> None:
        super().__init__()
        self._teacher = (teacher,)
        self.positions = nn.Parameter(torch.zeros(1))
        self.out = nn.Sequential(nn.LazyLinear(4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        states = self._teacher[0](torch.stack(images), VISION, {BLOCKS})[BLOCKS]
        return list(self.out(states))


def language(steps: int) -> LlamaForCausalLM:
    """The language model, pretrained on text."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=PAD,
        eos_token_id=END,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rows = [[*ids(text), END] for text in texts(4000, 0)]
    draw = random.Random(0)
    for _ in range(steps):
        given, labels = padded([(row, row) for row in draw.sample(rows, 32)])
        model(input_ids=given, attention_mask=(given != PAD).long(), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def teacher(steps: int) -> tuple[Teacher, float]:
    """A vision transformer that was trained to name digits of its own part, and its accuracy on those of the test."""
    torch.manual_seed(1)
    config = SiglipVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_channels=1,
        image_size=PIXELS,
        patch_size=PATCH,
        vision_use_head=False,
    )
    model, head = SiglipVisionModel(config), nn.Linear(48, 10)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=2e-3, weight_decay=0.05)

    def scores(images: Tensor) -> Tensor:
        large = F.interpolate(images[:, None], size=(PIXELS, PIXELS), mode="bilinear")
        return head(model(pixel_values=(large - 0.3) / 0.35).last_hidden_state.mean(1))

    images, labels = digits("teacher")
    wanted = torch.tensor(labels)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (32,))
        shift = torch.randint(-1, 2, (2,)).tolist()
        F.cross_entropy(scores(images[chosen].roll(shift, (1, 2))), wanted[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    images, labels = digits("test")
    with torch.no_grad():
        right = float((scores(images).argmax(1) == torch.tensor(labels)).float().mean())
    return Teacher(model), right


def padded(rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Ids and labels of rows, padded on the right."""
    width = max(len(row) for row, _ in rows)
    given = torch.tensor([row + [PAD] * (width - len(row)) for row, _ in rows])
    labels = torch.tensor([label + [-100] * (width - len(label)) for _, label in rows])
    return given, labels


def batch(rows: list[Scene | str]) -> dict[str, Any]:
    """The inputs of a step."""
    made, places, pixels = [], [], []
    for row in rows:
        if isinstance(row, str):
            tokens = [*ids(row), END]
            made.append((tokens, tokens))
            places.append([-1] * len(tokens))
            continue
        prompt, answer = ids(row.prompt), [*ids(row.answer), END]
        made.append(([PAD] * TOKENS + prompt + answer, [-100] * (TOKENS + len(prompt)) + answer))
        places.append([len(pixels)] * TOKENS + [-1] * (len(prompt) + len(answer)))
        pixels.append((row.image - VISION.mean[0]) / VISION.std[0])
    given, labels = padded(made)
    width = given.shape[1]
    image_ids = torch.tensor([place + [-1] * (width - len(place)) for place in places])
    valid = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in made])
    return {
        "input_ids": given,
        "labels": labels,
        "image_ids": image_ids,
        "attention_mask": valid,
        "pixel_values": pixels,
    }


@torch.no_grad()
def right(vora: VoRA, rows: list[Scene]) -> float:
    """The share of rows whose whole answer is the likeliest, token by token."""
    vora.eval()
    found = 0
    for start in range(0, len(rows), 64):
        given = batch(rows[start : start + 64])
        labels = given.pop("labels")[:, 1:]
        guesses = vora(**given).logits[:, :-1].argmax(-1)
        found += int(((guesses == labels) | (labels == -100)).all(1).sum())
    return found / len(rows)


@torch.no_grad()
def loss_of(vora: VoRA, rows: list[Any]) -> float:
    """The loss of rows in nats per token."""
    vora.eval()
    return float(vora(**batch(rows)).loss)


def learn(base: nn.Module, vit: Teacher, how: Condition, rate: float, seed: int, sizes: Any) -> dict[str, Any]:
    """Learn to see, and measure."""
    model = copy.deepcopy(base)
    method = None if how.connector else Full() if how.whole else LoRA(r=how.rank, scaling="none", seed=seed)
    blocks = 6 if how.whole else how.blocks
    vora = VoRA(model, vision=VISION, blocks=blocks, method=method, mask=how.mask, seed=seed)  # type: ignore[arg-type]
    if how.connector:
        model.requires_grad_(False)
        torch.manual_seed(seed)
        vora.embedding = Connector(vit, WIDTH)  # type: ignore[assignment]
        vora.embedding([torch.zeros(1, PIXELS, PIXELS)])
    if how.distills:
        vora.distill(vit, seed=seed)
    fresh, rows, draw = texts(256, 999), scenes("train", sizes.rows, seed), random.Random(seed)
    valid, test, spoken = scenes("valid", 240, 0), scenes("test", 480, 0), texts(4000, 0)
    captions = [row for row in valid if not row.prompt]
    before, reached = loss_of(vora, fresh), None
    parameters = list(vora.trained().values())
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 30))
    began = time.process_time()
    for step in range(sizes.steps):
        count = round(32 * how.text)
        given = batch([*draw.sample(rows, 32 - count), *draw.sample(spoken, count)])
        loss = vora.train()(**given).loss
        extra = vora.distillation.total() if vora.distillation is not None else None
        (loss if extra is None else loss + extra).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if reached is None and step % 10 == 9 and loss_of(vora, captions) < MARK:
            reached = step + 1
    seconds = (time.process_time() - began) / sizes.steps
    found = {
        "valid": right(vora, valid),
        "test": right(vora, test),
        "text before": before,
        "text after": loss_of(vora, fresh),
        "steps to the mark": reached if reached is not None else math.inf,
        "CPU s of a step": seconds,
        "trained parameters": sum(p.numel() for p in parameters),
    }
    if vora.adapter is not None:
        vora.distill(None)
        given = batch(test[:32])
        with torch.no_grad():
            apart = vora.eval()(**given).logits
            vora.merge()
            found["merged - unmerged"] = float((vora(**given).logits - apart).abs().max())
    kept = sum(p.numel() for p in vora.parameters()) - sum(p.numel() for p in base.parameters())
    found["added parameters"] = kept + (sum(p.numel() for p in vit.model.parameters()) if how.connector else 0)
    return found


def interval(values: list[float]) -> str:
    """Mean and half-width of the 95 % interval."""
    if any(math.isinf(value) for value in values):
        return f"not in {sum(map(math.isinf, values))} of {len(values)}"
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.3f} ± {half:.3f}"


def main() -> None:
    """Run the conditions and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--pretrain", type=int, default=400)
    parser.add_argument("--teach", type=int, default=600)
    parser.add_argument("--only", nargs="*", default=list(CONDITIONS))
    sizes = parser.parse_args()
    base = language(sizes.pretrain)
    vit, share = teacher(sizes.teach)
    found: dict[str, Any] = {"teacher": share, "settings": {k: str(v) for k, v in vars(sizes).items()}, "runs": {}}
    for name in sizes.only:
        how = CONDITIONS[name]
        tuned = {rate: learn(base, vit, how, rate, TUNING, sizes)["valid"] for rate in RATES}
        rate = max(tuned, key=lambda each: tuned[each])
        runs = [learn(base, vit, how, rate, seed, sizes) for seed in range(sizes.seeds)]
        found["runs"][name] = {
            "rate": rate,
            "tuning": {f"{key:g}": value for key, value in tuned.items()},
            "seeds": runs,
        }
        sizes.out.parent.mkdir(parents=True, exist_ok=True)
        sizes.out.write_text(json.dumps(found, indent=1) + "\n")
        print(name, {key: interval([run[key] for run in runs if key in run]) for key in runs[0]}, flush=True)
    first = found["runs"].get("VoRA")
    for name, other in found["runs"].items():
        if first is not None and name != "VoRA":
            gaps = [a["test"] - b["test"] for a, b in zip(first["seeds"], other["seeds"], strict=True)]
            print(f"VoRA minus {name}: {interval(gaps)} of the test", flush=True)


if __name__ == "__main__":
    main()
