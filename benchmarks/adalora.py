"""Time AdaLoRA's training step relative to LoRA's, while components are masked and after the ranks are final.

In the first row, both have rank 16 at all sites, and AdaLoRA chooses its components anew at each step. In the second,
AdaLoRA has reduced rank 16 to mean rank 8, unevenly over the sites, and LoRA has rank 8. Steps are 4 rows x 256 tokens
with AdamW (foreach). PEFT's AdaLoRA is relative to PEFT's LoRA.
"""

from __future__ import annotations

import measure as m
import peft
import torch
from torch import nn
from train_step import step_of

import reparam

INIT, TARGET = m.RANK, m.RANK // 2
FOREVER = 10**6


def bound_step(model: nn.Module, adapter: reparam.Adapter, ids: torch.Tensor) -> m.Call:
    """A training step with an optimizer that the adapter is bound to."""
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-5, foreach=True)
    adapter.bind(optimizer)

    def call() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def ours(base: nn.Module, ids: torch.Tensor, *, tinit: int, tfinal: int, total: int) -> tuple[m.Call, reparam.Adapter]:
    """A training step with reparam's AdaLoRA on all linear layers, and its adapter."""
    model = m.twin(base)
    method = reparam.AdaLoRA(
        init_r=INIT, target_r=TARGET, alpha=2 * INIT, tinit=tinit, tfinal=tfinal, total_steps=total
    )
    adapter = reparam.attach(model, method)
    return bound_step(model, adapter, ids), adapter


def lora(base: nn.Module, ids: torch.Tensor, r: int) -> tuple[m.Call, reparam.Adapter]:
    """A training step with reparam's LoRA on all linear layers, and its adapter."""
    model = m.twin(base)
    adapter = reparam.attach(model, reparam.LoRA(r=r, alpha=2 * r))
    return bound_step(model, adapter, ids), adapter


def theirs(base: nn.Module, ids: torch.Tensor) -> m.Call:
    """A training step with PEFT's AdaLoRA, including `update_and_allocate`."""
    config = peft.AdaLoraConfig(
        init_r=INIT,
        target_r=TARGET,
        total_step=FOREVER,
        lora_alpha=2 * INIT,
        target_modules=list(m.LINEARS),
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(m.twin(base), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, foreach=True)
    steps = iter(range(FOREVER // 2, FOREVER))

    def call() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(next(steps))
        optimizer.zero_grad()

    return call


def numbers(adapter: reparam.Adapter) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in adapter.parameters())


def main() -> None:
    quick = m.setup(__doc__)
    base = m.llama(m.TINY if quick else m.LLAMA).train()
    ids = torch.randint(0, base.config.vocab_size, (2, 16) if quick else (4, 256))
    falling, before = ours(base, ids, tinit=0, tfinal=1, total=FOREVER)
    final, after = ours(base, ids, tinit=0, tfinal=1, total=3)
    for _ in range(3):
        final()
    high, _ = lora(base, ids, INIT)
    low, target = lora(base, ids, TARGET)
    ranks = [len(update.factors(after.modules[path].weight).A) for path, update in after.updates.items()]
    rivals = {"peft": theirs(base, ids), "peft lora": step_of(m.with_peft(m.twin(base)), ids)}
    calls = {"falling": falling, "high": high, "final": final, "low": low, **rivals}
    times = m.interleave(calls, rounds=2 if quick else 12)
    size = f"{ids.shape[0]} x {ids.shape[1]}"
    rows = [
        m.Row(
            f"step {size}, components chosen at every step, over LoRA's at rank {INIT}",
            times.over("falling", "high"),
            times.over("peft", "peft lora"),
            1.0,
            1.05,
        ),
        m.Row(
            f"step {size} after the ranks are final, over LoRA's at rank {TARGET}",
            times.over("final", "low"),
            None,
            1.0,
            1.05,
        ),
        m.Row(
            f"trained parameters after the ranks are final, over LoRA's at rank {TARGET}",
            numbers(after) / numbers(target),
            None,
            1.0,
            None,
        ),
        m.Row("trained parameters, after over before", numbers(after) / numbers(before), 1.0, TARGET / INIT, None),
    ]
    m.show(f"AdaLoRA, {INIT} to {TARGET}, on all linear layers", rows, "python benchmarks/adalora.py")
    print(f"Ranks of the sites at the end: {min(ranks)} to {max(ranks)}\n")


if __name__ == "__main__":
    main()
