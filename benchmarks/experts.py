"""LoRA and NF4 on stacked experts against the base: time of a step and of a token, and memory.

    python benchmarks/experts.py [--repeat 5]

One module of Mixtral's experts on one thread in float32: hidden size 512, 256 tokens, rank 8. Times are the least of
several runs in CPU time, which other processes disturb least.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import reparam

SIZE, TOKENS, RANK = 512, 256, 8


def make(experts: int, implementation: str) -> nn.ModuleDict:
    """A module of experts with random weights."""
    config = SimpleNamespace(
        num_local_experts=experts,
        hidden_size=SIZE,
        intermediate_size=SIZE,
        hidden_act="silu",
        _experts_implementation=implementation,
    )
    module = MixtralExperts(config).requires_grad_(False)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    return nn.ModuleDict({"experts": module})


def least(run: Callable[[], Any], repeat: int) -> float:
    """The least CPU milliseconds of a run."""
    run()
    found = []
    for _ in range(repeat):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return 1000 * min(found)


def measured(model: nn.ModuleDict, experts: int, top: int, repeat: int) -> tuple[float, float]:
    """Milliseconds of a step, forward and backward, and of one token without gradients."""
    draw = torch.Generator().manual_seed(0)

    def inputs(count: int) -> tuple[torch.Tensor, ...]:
        chosen = torch.rand(count, experts, generator=draw).topk(top).indices
        return torch.randn(count, SIZE, generator=draw), chosen, torch.rand(count, top, generator=draw)

    many, one = inputs(TOKENS), inputs(1)
    many[0].requires_grad_()

    def step() -> None:
        model["experts"](*many).sum().backward()

    @torch.no_grad()
    def token() -> None:
        model["experts"](*one)

    return least(step, repeat), least(token, 4 * repeat)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5, help="runs of which the least counts")
    repeat = parser.parse_args().repeat
    torch.set_num_threads(1)
    print("| experts | implementation | what | step, ms | token, ms | step over eager base | bytes an entry |")
    print("|---|---|---|---|---|---|---|")
    for experts, top in ((8, 2), (64, 8)):
        eager = None
        for implementation in ("eager", "grouped_mm"):
            model = make(experts, implementation)
            entries = sum(parameter.numel() for parameter in model.parameters())
            rows = [("base", measured(model, experts, top, repeat), 4.0)]
            eager = eager or rows[0][1][0]
            reparam.attach(model, reparam.LoRA(r=RANK), targets="experts")
            rows.append(("LoRA", measured(model, experts, top, repeat), 4.0))
            reparam.remove(model, "default")
            report = reparam.quantize(model, "nf4", targets="experts")
            packed = sum(site.bytes for site in report.sites) / entries
            rows.append(("NF4", measured(model, experts, top, repeat), packed))
            reparam.attach(model, reparam.LoRA(r=RANK), targets="experts")
            rows.append(("NF4 and LoRA", measured(model, experts, top, repeat), packed))
            for what, (step, token), size in rows:
                print(
                    f"| {experts}, top {top} | {implementation} | {what} | {step:.1f} | {token:.2f} | "
                    f"{step / eager:.2f} | {size:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
