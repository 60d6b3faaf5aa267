"""Time forward passes with each baseline method at batch size 1, relative to the base model.

Bottlenecks have width 64 and LoRA has rank 16 on all linear layers, which are about equally many parameters. Prefix and
prompt tuning add 20 positions before the text. The merged and the fully trained model have their own matrices, while
the others share those of the base.
"""

from __future__ import annotations

import copy

import measure as m
from torch import nn

import reparam
from reparam.core.method import Method
from reparam.hf import prompts
from reparam.methods.prompts import Prefix, Prompt

HOULSBY, PARALLEL = "bottleneck, houlsby", "bottleneck, parallel"
METHODS: dict[str, Method] = {
    "LoRA": reparam.LoRA(r=m.RANK, alpha=2 * m.RANK),
    HOULSBY: reparam.Bottleneck(r=64),
    PARALLEL: reparam.Bottleneck(r=64, placement="parallel"),
    "full": reparam.Full(),
}


def contestants(base: nn.Module) -> tuple[dict[str, nn.Module], dict[str, int]]:
    """The models, and the number of trained parameters of each method."""
    models, trained = {"base": base}, {}
    for name, method in METHODS.items():
        adapter = reparam.attach(m.twin(base), method)
        if name != "full":
            m.randomize(adapter.parameters())
        models[name], trained[name] = adapter.model, sum(p.numel() for p in adapter.parameters())
    merged = m.with_reparam(copy.deepcopy(base))
    reparam.merge(merged)
    models["LoRA, merged"], trained["LoRA, merged"] = merged, trained["LoRA"]
    for positions in (Prefix(tokens=20), Prompt(tokens=20)):
        handle = prompts.attach(m.twin(base), positions)
        models[positions.name], trained[positions.name] = handle.model.eval(), handle.parameters()[0].numel()
    return models, trained


def main() -> None:
    quick = m.setup(__doc__)
    models, trained = contestants(m.llama(m.TINY if quick else m.LLAMA))
    found: dict[str, list[float]] = {name: [] for name in trained}
    for tokens, rounds in ((1, 100), (512, 10)):
        work = {name: m.forward(model, 1, tokens) for name, model in models.items()}
        times = m.interleave(work, rounds=3 if quick else rounds)
        for name, ratios in found.items():
            ratios.append(times.over(name, "base"))
    print(
        "### Forward at batch size 1, over the base\n\n"
        "| method | one token | 512 tokens | trained parameters |\n|---|---|---|---|"
    )
    for name, (one, many) in sorted(found.items(), key=lambda item: item[1][0]):
        print(f"| {name} | {one:.3f} | {many:.3f} | {trained[name]:,} |")
    print("\n    python benchmarks/baselines.py\n")


if __name__ == "__main__":
    main()
