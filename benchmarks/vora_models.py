"""The language model, the teacher and the connector of `vora.py`. Models are trained once and kept as safetensors."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel
from vora_scenes import IDS, PIXELS, WORDS, Scene, digits, ids, texts

from reparam.vision import Teacher, Vision

DEPTH, BLOCKS, WIDTH, PATCH = 6, 4, 96, 4
VISION = Vision(patch=PATCH, size=PIXELS, width=48, channels=1, mean=(0.3,), std=(0.35,))
TOKENS = VISION.side**2
PAD, END = IDS["<pad>"], IDS["<end>"]
LANGUAGE_STEPS, TEACHER_STEPS = 400, 3500


class Connector(nn.Module):
    """The baseline: the last states of the teacher, and a trained map of two layers to the width of the model."""

    def __init__(self, teacher: Teacher, hidden: int) -> None:
        super().__init__()
        self._teacher = (teacher,)
        self.positions = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.out = nn.Sequential(nn.Linear(48, hidden), nn.GELU(), nn.Linear(hidden, WIDTH))

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        """The tokens [T, width] of each image."""
        states = self._teacher[0](torch.stack(images), VISION, {BLOCKS})[BLOCKS]
        return list(self.out(states))


def language(folder: Path) -> LlamaForCausalLM:
    """The language model, pretrained on all kinds of sentences."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=PAD,
        eos_token_id=END,
    )
    model = LlamaForCausalLM(config)
    file = folder / "language.safetensors"
    if file.exists():
        model.load_state_dict(load_file(file), strict=False)
        return model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rows = [[*ids(text), END] for text in texts(4000, 0)]
    draw = random.Random(0)
    for _ in range(LANGUAGE_STEPS):
        given, labels = padded([(row, row) for row in draw.sample(rows, 32)])
        model(input_ids=given, attention_mask=(given != PAD).long(), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, file)
    return model.eval()


def teacher(folder: Path) -> tuple[Teacher, float]:
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
    both = nn.ModuleDict({"model": model, "head": head})

    def scores(images: Tensor) -> Tensor:
        large = F.interpolate(images[:, None], size=(PIXELS, PIXELS), mode="bilinear")
        return head(model(pixel_values=(large - 0.3) / 0.35).last_hidden_state.mean(1))

    file = folder / "teacher.safetensors"
    if file.exists():
        both.load_state_dict(load_file(file))
    else:
        _teach(both, scores)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(both.state_dict(), file)
    images, labels = digits("test")
    with torch.no_grad():
        share = float((scores(images).argmax(1) == torch.tensor(labels)).float().mean())
    return Teacher(model), share


def _teach(both: nn.ModuleDict, scores: Any) -> None:
    """Train on digits that are shifted, turned and scaled at random."""
    optimizer = torch.optim.AdamW(both.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * (1 + math.cos(math.pi * step / TEACHER_STEPS)) / 2
    )
    images, labels = digits("teacher")
    wanted = torch.tensor(labels)
    for _ in range(TEACHER_STEPS):
        chosen = torch.randint(len(labels), (32,))
        F.cross_entropy(scores(_moved(images[chosen])), wanted[chosen]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def _moved(images: Tensor) -> Tensor:
    """Images [B, 8, 8], each turned by up to 15 degrees, scaled by up to 15 % and shifted by up to one pixel."""
    count = len(images)
    angle = (torch.rand(count) - 0.5) * math.pi / 6
    size = 1 + (torch.rand(count) - 0.5) * 0.3
    shift = (torch.rand(count, 2) - 0.5) * 0.5
    cos, sin = angle.cos() * size, angle.sin() * size
    matrix = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).view(count, 2, 3)
    grid = F.affine_grid(matrix, [count, 1, *images.shape[1:]], align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def padded(rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Ids and labels of rows, padded on the right."""
    width = max(len(row) for row, _ in rows)
    given = torch.tensor([row + [PAD] * (width - len(row)) for row, _ in rows])
    labels = torch.tensor([label + [-100] * (width - len(label)) for _, label in rows])
    return given, labels


def batch(rows: list[Any]) -> dict[str, Any]:
    """The inputs of a step: rows are scenes and sentences."""
    made, places, pixels = [], [], []
    for row in rows:
        if not isinstance(row, Scene):
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
    return {
        "input_ids": given,
        "labels": labels,
        "image_ids": torch.tensor([place + [-1] * (width - len(place)) for place in places]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in made]),
        "pixel_values": pixels,
    }
