"""Adapters of every mergeable method in folders, and what `generate` answers with each of them alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import models
import torch

import reparam
from reparam.serve import Limits

SMALL = Limits(requests=8, step_tokens=64, cache_tokens=1024)
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": reparam.LoRA(r=2, alpha=4)},
    "wide": {"method": reparam.LoRA(r=8, alpha=8), "targets": "all-linear"},
    "dora": {"method": reparam.DoRA(r=3, alpha=6), "targets": ["v_proj", "down_proj"]},
    "adalora": {"method": reparam.AdaLoRA(init_r=4, target_r=2)},
    "full": {"method": reparam.Full(), "targets": ["o_proj"]},
    "intrinsic": {"method": reparam.Intrinsic(d=20)},
    "head": {"method": reparam.LoRA(r=2, alpha=4), "targets": ["lm_head", "q_proj"]},
    "words": {"method": reparam.LoRA(r=2, alpha=4), "targets": ["embed_tokens", "up_proj"]},
}


def save(model: Any, folder: Path, *, seed: int = 0, **settings: Any) -> Path:
    """A changed adapter of this model in a folder; `settings` are those of `attach`. The model stays as it was."""
    settings = {"targets": ["q_proj", "up_proj"], **settings}
    adapter = reparam.attach(model, settings.pop("method", reparam.LoRA(r=2, alpha=4)), name="made", **settings)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in adapter.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    adapter.save(folder)
    reparam.remove(model, "made")
    return folder


def save_all(model: Any, root: Path, names: Iterable[str] = METHODS) -> Path:
    for seed, name in enumerate(names):
        save(model, root / name, seed=seed, **METHODS[name])
    return root


def prompts(count: int, *, longest: int = 40, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(2, models.VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def alone(model: Any, root: Path) -> Callable[..., list[int]]:
    """What `generate` answers with one adapter on the model: a function of a prompt, a name or None, and a number."""
    reparam_names = [path.name for path in sorted(root.iterdir())]
    for name in reparam_names:
        reparam.load(model, root / name, name=name)

    def answer(prompt: list[int], name: str | None, most: int, **settings: Any) -> list[int]:
        reparam.select(model, name)
        ids = torch.tensor([prompt])
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=most,
            **{"do_sample": False, "pad_token_id": 0, **settings},
        )
        return found[0, len(prompt) :].tolist()

    return answer
