"""Time a training step (forward, backward, AdamW with foreach) on 4 rows x 256 tokens; count bytes kept for backward.

The time of the step is divided by the time that its FLOPs would take at the speed of the full fine-tuning step. FLOPs
are counted by torch's `FlopCounterMode`: all matrix products, and attention by torch's formula for flash attention (2
products forward, 5 backward, without the causal mask). Elementwise work is the same in both steps but counts no FLOPs,
so 1 cannot quite be reached. The second row avoids this: it compares with the frozen model without an adapter (forward,
and backward to the input embeddings), plus the factors' FLOPs at the same speed, without an optimizer.

Bytes kept for backward are the distinct storages of all tensors that autograd saves, without the parameters.
"""

from __future__ import annotations

import copy

import measure as m
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def backward_of(model: nn.Module, ids: Tensor) -> m.Call:
    """Forward and backward, without keeping gradients; for a frozen model, backward to the output of its embeddings."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def call() -> None:
        if trained:
            loss = model(input_ids=ids, labels=ids).loss
        else:
            embedded = model.get_input_embeddings()(ids).requires_grad_()
            loss = model(inputs_embeds=embedded, labels=ids).loss
        loss.backward()
        for p in trained:
            p.grad = None

    return call


def step_of(model: nn.Module, ids: Tensor) -> m.Call:
    """A training step: forward, backward and AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, foreach=True)

    def call() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def flops(call: m.Call) -> int:
    """Floating-point operations of the call's matrix products and attention."""
    ops = torch.ops.aten
    attention = {
        ops._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        ops._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
            g, q, k, v
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        call()
    return counter.get_total_flops()


def main() -> None:
    quick = m.setup(__doc__)
    base = m.llama(m.TINY if quick else m.LLAMA).train()
    full = copy.deepcopy(base)
    frozen = m.twin(base).requires_grad_(False)
    ours, theirs = m.with_reparam(m.twin(base)), m.with_peft(m.twin(base))
    ids = torch.randint(0, base.config.vocab_size, (2, 16) if quick else (4, 256))
    rounds = 2 if quick else 12

    models = {"full": full, "ours": ours, "peft": theirs, "frozen": frozen}
    passes = {name: backward_of(model, ids) for name, model in models.items()}
    count = {name: flops(call) for name, call in passes.items()}
    kept = {
        name: m.kept_bytes(models[name], lambda model: model(input_ids=ids, labels=ids).loss)
        for name in ("full", "ours", "peft")
    }
    steps = m.interleave({name: step_of(models[name], ids) for name in ("full", "ours", "peft")}, rounds=rounds)
    bare = m.interleave({name: passes[name] for name in ("frozen", "ours", "peft")}, rounds=rounds)

    share, share_frozen = count["ours"] / count["full"], count["ours"] / count["frozen"]
    size = f"{ids.shape[0]} x {ids.shape[1]}"
    rows = [
        m.Row(
            f"training step {size}, over its FLOPs at the speed of the full fine-tuning step",
            steps.over("ours", "full") / share,
            steps.over("peft", "full") / share,
            1.0,
            1.03,
        ),
        m.Row(
            f"forward and backward {size}, over their FLOPs at the speed of the frozen model",
            bare.over("ours", "frozen") / share_frozen,
            bare.over("peft", "frozen") / share_frozen,
            1.0,
            None,
        ),
        m.Row(
            "bytes kept for backward, over full", kept["ours"] / kept["full"], kept["peft"] / kept["full"], None, 0.90
        ),
    ]
    m.show("Training", rows, "python benchmarks/train_step.py")
    print(f"FLOPs of a step: full {count['full']:.4g}, LoRA {count['ours']:.4g} ({share:.4f})\n")


if __name__ == "__main__":
    main()
