"""Time forward passes with one adapter, not merged, relative to the base model.

Limit for one token: bytes of weights and factors over bytes of weights, because each is read from memory once. Limit
for 512 tokens: multiply-adds of all linear layers and attention with the factors, over those without.
"""

from __future__ import annotations

import measure as m


def main() -> None:
    quick = m.setup(__doc__)
    shape = m.TINY if quick else m.LLAMA
    base = m.llama(shape)
    ours, theirs = m.with_reparam(m.twin(base)), m.with_peft(m.twin(base))
    weights = sum(p.numel() for p in base.parameters()) - base.get_input_embeddings().weight.numel()
    factors = m.lora_elements(base)
    rows = []
    for tokens, rounds, goal in ((1, 300, 1.12), (512, 30, 1.06)):
        models = {"base": base, "ours": ours, "peft": theirs}
        work = {name: m.forward(model, 1, tokens) for name, model in models.items()}
        times = m.interleave(work, rounds=3 if quick else rounds)
        attention = 2 * tokens * shape.hidden * shape.layers  # multiply-adds per token
        limit = 1 + factors / (weights + attention)
        what = "one token" if tokens == 1 else f"{tokens} tokens"
        rows.append(m.Row(f"forward of {what}", times.over("ours", "base"), times.over("peft", "base"), limit, goal))
    m.show("Forward with an adapter, over the base", rows, "python benchmarks/forward.py")


if __name__ == "__main__":
    main()
