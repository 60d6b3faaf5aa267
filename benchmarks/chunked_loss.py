"""The loss in chunks of logits against transformers' own: time of a training step, and peak memory.

A Llama of 512 x 4 with LoRA of rank 16 on all linear layers, in float32, on one thread. Each step has 2 rows of 256
tokens; either all of them carry loss or the last 30 % of each row, as answers do. The memory is the peak of torch's
allocator during forward and backward pass, beyond what was held before.

    python benchmarks/chunked_loss.py
"""

from __future__ import annotations

import torch
from measure import Call, Shape, interleave, llama, peak_bytes, setup, with_reparam
from torch import Tensor, nn

from reparam.hf.chunked import ChunkedLoss


def steps(model: nn.Module, ids: Tensor, labels: Tensor) -> dict[str, Call]:
    """Forward and backward pass, with the loss in chunks and as transformers computes it."""
    chunked = ChunkedLoss(model)

    def whole() -> None:
        model(input_ids=ids, labels=labels).loss.backward()

    def chunks() -> None:
        with chunked:
            whole()

    return {"chunks": chunks, "whole": whole}


def main() -> None:
    quick = setup(__doc__ or "")
    rows, tokens = (2, 16) if quick else (2, 256)
    print("| vocabulary | tokens with loss | seconds, chunks | whole | ratio | peak MiB, chunks | whole | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for vocabulary in (500,) if quick else (4096, 32_000, 128_000):
        shape = Shape(64, 96, 1, 2, vocabulary) if quick else Shape(512, 1376, 4, 8, vocabulary)
        model = with_reparam(llama(shape))
        ids = torch.randint(0, vocabulary, (rows, tokens))
        for share in (1.0, 0.3):
            labels = ids.clone()
            labels[:, : round(tokens * (1 - share))] = -100
            work = steps(model, ids, labels)
            times = interleave(work, rounds=2 if quick else 3)
            peaks = {name: peak_bytes(call) / 2**20 for name, call in work.items()}
            print(
                f"| {vocabulary:,} | {share:.0%} | {times.median('chunks'):.2f} | {times.median('whole'):.2f} | "
                f"{times.over('chunks', 'whole'):.2f} | {peaks['chunks']:.0f} | {peaks['whole']:.0f} | "
                f"{peaks['chunks'] / peaks['whole']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
