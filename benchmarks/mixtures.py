"""Time training steps and forward passes of mixtures of experts, relative to LoRA with the same total rank.

N experts of rank 16 / N have as many parameters in their factors as LoRA with rank 16; a mixture adds its gates. Goals:
1.15 for mixtures with a gate per token, and 1 for a merged mixture, which is a plain model.
"""

from __future__ import annotations

import copy

import measure as m
import torch
from torch import nn
from train_step import step_of

import reparam
import reparam.methods
from reparam.core.method import Method
from reparam.core.registry import METHODS

EXPERTS = (1, 4, 8, 16)


def contestants() -> dict[str, Method]:
    """LoRA of rank 16, and the mixtures to compare with it."""
    found: dict[str, Method] = {"lora": METHODS["lora"](r=m.RANK)}
    for n in EXPERTS:
        found[f"molora, N = {n}"] = METHODS["molora"](n=n, r=m.RANK // n)
    for n in EXPERTS[1:]:
        found[f"top-2, N = {n}"] = METHODS["mixture"](n=n, r=m.RANK // n, select="top_k", k=2, gate="renorm")
    found["top-1 of 8, rank 16 each"] = METHODS["mixture"](n=8, r=m.RANK, select="top_k")
    found["all of 8, rank 16 each"] = METHODS["mixture"](n=8, r=m.RANK)
    found["static, N = 4"] = METHODS["mixture"](n=4, r=m.RANK // 4, router="static")
    found["task_gated, N = 8"] = METHODS["task_gated"](n=8, r=m.RANK, dropout=0.0)
    found["hydralora, N = 4, rank 4"] = METHODS["hydralora"](n=4, r=4, dropout=0.0)
    found["mov, N = 10"] = METHODS["mov"](n=10)
    return found


def cost(*, quick: bool) -> None:
    """Print the table of times relative to reparam's LoRA."""
    base = m.llama(m.TINY if quick else m.LLAMA).train()
    models: dict[str, nn.Module] = {}
    for name, method in contestants().items():
        models[name] = m.twin(base)
        m.randomize(reparam.attach(models[name], method).parameters())
    ids = torch.randint(0, base.config.vocab_size, (2, 16) if quick else (4, 256))
    steps = m.interleave({name: step_of(model, ids) for name, model in models.items()}, rounds=2 if quick else 8)
    found = {f"training step {ids.shape[0]} x {ids.shape[1]}": steps}
    for tokens, rounds in ((512, 10), (1, 100)):
        work = {name: m.forward(model.eval(), 1, tokens) for name, model in models.items()}
        found[f"forward of {tokens}"] = m.interleave(work, rounds=2 if quick else rounds)
    print(f"### Time of mixtures over reparam's LoRA of rank {m.RANK}\n")
    print(f"| | {' | '.join(found)} |\n|---|{'---|' * len(found)}")
    for name in list(models)[1:]:
        print(f"| {name} | " + " | ".join(f"{times.over(name, 'lora'):.3f}" for times in found.values()) + " |")
    print("\n    python benchmarks/mixtures.py\n")


def merged(*, quick: bool) -> None:
    """Print the times of a merged mixture, whose gates do not depend on the input, over those of merged LoRA."""
    base = m.llama(m.TINY if quick else m.LLAMA)
    models: dict[str, nn.Module] = {}
    for name, method in {
        "lora": METHODS["lora"](r=m.RANK),
        "static": METHODS["mixture"](n=4, r=m.RANK // 4, router="static"),
    }.items():
        models[name] = copy.deepcopy(base)  # merging writes to its matrices
        m.randomize(reparam.attach(models[name], method).parameters())
        reparam.merge(models[name])
    found = {}
    for tokens, rounds in ((512, 10), (1, 100)):
        work = {name: m.forward(model.eval(), 1, tokens) for name, model in models.items()}
        found[tokens] = m.interleave(work, rounds=2 if quick else rounds).over("static", "lora")
    told = ", ".join(f"{ratio:.3f} for a forward of {tokens}" for tokens, ratio in found.items())
    print(f"Time of a merged mixture (static) over merged LoRA: {told}\n")


def main() -> None:
    quick = m.setup(__doc__)
    cost(quick=quick)
    merged(quick=quick)


if __name__ == "__main__":
    main()
