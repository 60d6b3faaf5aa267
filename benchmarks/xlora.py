"""Time decoding with X-LoRA, 32 tokens after a prompt of 64 tokens at batch size 1, relative to LoRA.

reparam and PEFT mix the same four adapters of rank 16 with randomly initialized routers. Each token takes two passes:
one through the base, whose last hidden states give the weights, and one through the adapted model. reparam keeps a
cache for each of them. PEFT's `generate` always sets `use_cache=False`, so each token takes both passes over the whole
sequence. The LoRAs that both are compared with decode with a cache. The third row is a forward pass of the prompt,
which uses no cache.
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
    """Save random adapters in PEFT's format and return their folders."""
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
    """Greedy decoding of `tokens` tokens, with a cache unless the model disables it."""

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
            f"X-LoRA, {what}, over reparam's LoRA",
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
            f"X-LoRA, a forward of {length}, over reparam's LoRA",
            reading.over("ours", "our LoRA"),
            reading.over("theirs", "our LoRA"),
            None,
            None,
        ),
    ]
    m.show(f"Decoding with X-LoRA of {EXPERTS} adapters", rows, "python benchmarks/xlora.py")


if __name__ == "__main__":
    main()
