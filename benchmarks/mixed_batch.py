"""Time mixed batches, in which each row uses another adapter.

Limit for one token per row: bytes of the weights and of all adapters' factors, over bytes of the weights, if each is
read from memory once. Limit for 16 tokens per row: multiply-adds with the factors over those without. Limit for many
adapters over one: 1, because the arithmetic is the same. Limit for the bytes of the banks: those of the factors.
"""

from __future__ import annotations

import measure as m
import torch

import reparam
from reparam.sites.bank import Bank


def over_the_base(shape: m.Shape, *, rows: int, rounds: dict[int, int], goals: dict[int, float]) -> list[m.Row]:
    """Table rows for a batch of `rows` rows with as many adapters, over the base, for each number of tokens per row."""
    base = m.llama(shape)
    names = [f"a{i}" for i in range(rows)]
    ours, theirs = m.with_reparam(m.twin(base), names), m.with_peft(m.twin(base), names)
    reparam.select(ours, names)
    weights = sum(p.numel() for p in base.parameters()) - base.get_input_embeddings().weight.numel()
    factors = m.lora_elements(base)
    found = []
    for tokens, count in rounds.items():
        work = {
            "base": m.forward(base, rows, tokens),
            "ours": m.forward(ours, rows, tokens),
            "peft": m.forward(theirs, rows, tokens, names),
        }
        times = m.interleave(work, rounds=count)
        limit = 1 + factors * (rows if tokens == 1 else 1) / weights
        what = f"{rows} rows x {tokens} token{'s' * (tokens > 1)} with {rows} adapters, over the base"
        found.append(m.Row(what, times.over("ours", "base"), times.over("peft", "base"), limit, goals[tokens]))
    return found


def over_one_adapter(shape: m.Shape, *, rows: int, rounds: int, goal: float) -> m.Row:
    """Table row for a batch of `rows` rows with as many adapters, over the same batch with a single adapter."""
    base = m.llama(shape)
    names = [f"a{i}" for i in range(rows)]
    mixed, single = m.with_reparam(m.twin(base), names), m.with_reparam(m.twin(base))
    theirs, their_single = m.with_peft(m.twin(base), names), m.with_peft(m.twin(base))
    reparam.select(mixed, names)
    work = {
        "mixed": m.forward(mixed, rows, 1),
        "single": m.forward(single, rows, 1),
        "peft": m.forward(theirs, rows, 1, names),
        "peft single": m.forward(their_single, rows, 1),
    }
    times = m.interleave(work, rounds=rounds)
    what = f"{rows} rows with {rows} adapters over {rows} rows with one, hidden {shape.hidden} x {shape.layers} layers"
    return m.Row(what, times.over("mixed", "single"), times.over("peft", "peft single"), 1.0, goal)


def bytes_of_banks(shape: m.Shape, *, ranks: list[int], goal: float) -> m.Row:
    """Table row for the bytes that the banks hold for adapters of these ranks, over those of their factors."""
    model = m.llama(shape)
    adapters = [
        reparam.attach(model, reparam.LoRA(r=rank), name=f"a{i}", targets=m.LINEARS) for i, rank in enumerate(ranks)
    ]
    reparam.select(model, [adapter.name for adapter in adapters])
    held = sum(module.nbytes for module in model.modules() if isinstance(module, Bank))
    factors = sum(parameter.nbytes for adapter in adapters for parameter in adapter.parameters())
    what = f"bytes of banks with adapters of ranks {', '.join(map(str, ranks))}, over those of the factors"
    return m.Row(what, held / factors, None, 1.0, goal)


def main() -> None:
    quick = m.setup(__doc__)
    goals = {1: 2.5, 16: 1.25}
    if quick:
        rows = over_the_base(m.TINY, rows=4, rounds={1: 2, 16: 2}, goals=goals)
        rows.append(over_one_adapter(m.TINY, rows=4, rounds=2, goal=1.5))
        rows.append(bytes_of_banks(m.TINY, ranks=[2, 2, 8], goal=1.25))
    else:
        rows = over_the_base(m.LLAMA, rows=64, rounds={1: 40, 16: 10}, goals=goals)
        torch.manual_seed(0)
        rows.append(over_one_adapter(m.DEEP, rows=32, rounds=30, goal=1.5))
        rows.append(bytes_of_banks(m.LLAMA, ranks=[8, 8, 8, 8, 8, 256], goal=1.25))
    m.show("Mixed batches", rows, "python benchmarks/mixed_batch.py")


if __name__ == "__main__":
    main()
