"""Measure DoRA: training steps, forward passes, bytes kept for backward, and memory for computing the norms.

As in `train_step.py`, the time of a training step is divided by the time that its FLOPs would take at the speed of the
full fine-tuning step. For both libraries, the FLOPs are those of reparam's step, with the norms. Forward passes are not
merged and are relative to the base model. In eval mode reparam caches the norms; PEFT computes them in each forward.

Bytes kept for backward are relative to LoRA in the same library. Memory for the norms is the peak of bytes held while
they are computed, relative to the factors and the norms themselves: (O + I) R + O numbers of 4 bytes.
"""

from __future__ import annotations

import copy

import measure as m
import peft
import torch
from torch import nn
from train_step import backward_of, flops, step_of

import reparam


def with_ours(model: nn.Module) -> nn.Module:
    """Attach reparam's DoRA to all linear layers, with random factors and the magnitudes of the base."""
    adapter = reparam.attach(model, reparam.DoRA(r=m.RANK, alpha=2 * m.RANK))
    m.randomize(p for name, p, _ in adapter.named_parameters() if not name.endswith("magnitude"))
    return model


def with_theirs(model: nn.Module) -> nn.Module:
    """Attach PEFT's DoRA in the same way."""
    config = peft.LoraConfig(r=m.RANK, lora_alpha=2 * m.RANK, target_modules=list(m.LINEARS), use_dora=True)
    wrapped = peft.get_peft_model(model, config)
    m.randomize(p for name, p in wrapped.named_parameters() if ".lora_A" in name or ".lora_B" in name)
    return wrapped.train(model.training)


def norm_memory(side: int, rank: int) -> tuple[float, float]:
    """Peak bytes while the norms of one layer [side, side] are computed, over those of its factors: reparam, PEFT."""
    base = nn.Sequential(nn.Linear(side, side, bias=False))
    ours = reparam.attach(m.twin(base), reparam.DoRA(r=rank), targets=["0"]).model[0].eval()
    theirs = peft.get_peft_model(m.twin(base), peft.LoraConfig(r=rank, target_modules=["0"], use_dora=True)).eval()
    x, factors = torch.randn(1, side), 4 * (2 * side * rank + side)

    def first() -> None:
        ours.updates["default"].forget()
        ours(x)

    with torch.no_grad():
        first()  # computes ‖W‖² once and caches it
        return m.peak_bytes(first) / factors, m.peak_bytes(lambda: theirs(x)) / factors


def main() -> None:
    quick = m.setup(__doc__)
    shape = m.TINY if quick else m.LLAMA
    base = m.llama(shape).train()
    models = {
        "full": copy.deepcopy(base),
        "base": m.twin(base).requires_grad_(False),
        "ours": with_ours(m.twin(base)),
        "peft": with_theirs(m.twin(base)),
        "lora": m.with_reparam(m.twin(base)),
        "peft lora": m.with_peft(m.twin(base)),
    }
    ids = torch.randint(0, base.config.vocab_size, (2, 16) if quick else (4, 256))
    count = {name: flops(backward_of(models[name], ids)) for name in ("full", "ours", "lora")}
    names = [name for name in models if name not in ("full", "base")]
    kept = {name: m.kept_bytes(models[name], lambda model: model(input_ids=ids, labels=ids).loss) for name in names}
    steps = m.interleave(
        {name: step_of(models[name], ids) for name in ("full", "ours", "peft", "lora")}, rounds=2 if quick else 12
    )
    size, share = f"{ids.shape[0]} x {ids.shape[1]}", count["ours"] / count["full"]
    rows = [
        m.Row(
            f"training step {size}, over its FLOPs at the speed of the full fine-tuning step",
            steps.over("ours", "full") / share,
            steps.over("peft", "full") / share,
            1.0,
            1.15,
        ),
        m.Row(f"training step {size}, over reparam's LoRA", steps.over("ours", "lora"), None, None, None),
        m.Row(
            "bytes kept for backward, over LoRA by the same library",
            kept["ours"] / kept["lora"],
            kept["peft"] / kept["peft lora"],
            1.0,
            1.1,
        ),
    ]
    for tokens, rounds, goal in ((1, 300, 1.2), (512, 30, 1.1)):
        work = {name: m.forward(models[name].eval(), 1, tokens) for name in ("base", "ours", "peft", "lora")}
        times = m.interleave(work, rounds=3 if quick else rounds)
        what = "one token" if tokens == 1 else f"{tokens} tokens"
        rows += [
            m.Row(
                f"forward of {what}, over the base", times.over("ours", "base"), times.over("peft", "base"), None, goal
            ),
            m.Row(f"forward of {what}, over reparam's LoRA", times.over("ours", "lora"), None, None, None),
        ]
    ours, theirs = norm_memory(64 if quick else 4096, m.RANK)
    rows.append(
        m.Row("memory while the norms of 4096 x 4096 are measured, over the factors'", ours, theirs, None, None)
    )
    m.show("DoRA, r = 16, on all linear layers", rows, "python benchmarks/dora.py")
    print(
        f"FLOPs of a step: full {count['full']:.4g}, DoRA {count['ours']:.4g} ({share:.4f}), LoRA {count['lora']:.4g}\n"
    )


if __name__ == "__main__":
    main()
