"""X-LoRA's decoding: 32 tokens after a prompt of 64, one row, over that of a plain LoRA on the same model.

Both mix the same four adapters of rank 16, read from the same folders, by a router with random weights. Each token
takes two passes: the base's, whose last hidden states give the weights, and the adapted model's. Ours keeps a cache for
each of the two; PEFT's `generate` sets `use_cache=False` whatever it is asked for, so that each token takes both passes
over everything before it. The plain LoRAs that both are compared with decode with a cache. A forward of the prompt
alone, where no cache is of use, is the third line.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import measure as m
import peft
import torch
from torch import Tensor, nn

import reparam
from reparam.core.registry import METHODS

EXPERTS = 4


def folders(base: nn.Module, where: Path) -> list[str]:
    """Random adapters in PEFT's format."""
    found = []
    for number in range(EXPERTS):
        adapter = reparam.attach(m.twin(base), reparam.LoRA(r=m.RANK, alpha=2 * m.RANK))
        m.randomize(adapter.parameters())
        adapter.save(where / str(number), format="peft")
        found.append(str(where / str(number)))
    return found


def ours(base: nn.Module, experts: list[str]) -> nn.Module:
    model = m.twin(base)
    m.randomize(reparam.attach(model, METHODS["xlora"](experts=tuple(experts))).parameters())
    return model.eval()


def theirs(base: nn.Module, experts: list[str]) -> nn.Module:
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=base.config.hidden_size,
        adapters={str(number): folder for number, folder in enumerate(experts)},
    )
    model = peft.get_peft_model(m.twin(base), config)
    m.randomize(p for name, p in model.named_parameters() if "internal_xlora_classifier" in name)
    return model.eval()


def decode(model: nn.Module, prompt: Tensor, tokens: int) -> m.Call:
    """Greedy decoding of so many tokens, with a cache where the model has one."""

    def call() -> None:
        with torch.no_grad():
            model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )

    return call


def main() -> None:
    quick = m.setup(__doc__)
    base = m.llama(m.TINY if quick else m.LLAMA)
    length, tokens, rounds = (8, 4, 2) if quick else (64, 32, 6)
    with tempfile.TemporaryDirectory() as place:
        experts = folders(base, Path(place))
        models = {
            "ours": ours(base, experts),
            "theirs": theirs(base, experts),
            "our LoRA": m.with_reparam(m.twin(base)),
            "their LoRA": m.with_peft(m.twin(base)),
        }
    prompt = torch.randint(3, base.config.vocab_size, (1, length))
    decoding = m.interleave({name: decode(model, prompt, tokens) for name, model in models.items()}, rounds=rounds)
    reading = m.interleave({name: m.forward(model, 1, length) for name, model in models.items()}, rounds=2 * rounds)
    what = f"{tokens} tokens after {length}"
    rows = [
        m.Row(
            f"X-LoRA, {what}, over our LoRA's",
            decoding.over("ours", "our LoRA"),
            decoding.over("theirs", "our LoRA"),
            None,
            None,
        ),
        m.Row(
            f"X-LoRA, {what}, over the same library's LoRA",
            decoding.over("ours", "our LoRA"),
            decoding.over("theirs", "their LoRA"),
            None,
            None,
        ),
        m.Row(
            f"X-LoRA, a forward of {length}, over our LoRA's",
            reading.over("ours", "our LoRA"),
            reading.over("theirs", "our LoRA"),
            None,
            None,
        ),
    ]
    m.show(f"Decoding with X-LoRA of {EXPERTS} adapters", rows, "python benchmarks/xlora.py")


if __name__ == "__main__":
    main()
