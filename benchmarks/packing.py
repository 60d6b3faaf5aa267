"""Packing: tokens of rows per CPU second in training, beside padded batches and batches of rows of similar length.

The lengths of the rows have a log-normal distribution, as those of chats have: most are short, and a few fill a row of
512 tokens. The model is a Llama of 512 x 4 with LoRA of rank 16 on all linear layers, in float32, on one thread. Every
batch holds about the same number of tokens with its padding; only tokens of rows count.

    python benchmarks/packing.py
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import torch
from measure import Shape, llama, setup, with_reparam
from torch import nn

from reparam.data.batches import Collator, Encoded, Report
from reparam.data.packing import Packed
from reparam.hf.chunked import ChunkedLoss
from reparam.hf.packed import packed_collator


def rows(count: int, longest: int, vocabulary: int) -> Encoded:
    """Rows of random tokens whose lengths have a log-normal distribution, cut off at `longest`."""
    draw = random.Random(0)
    lengths = [min(longest, max(8, round(draw.lognormvariate(4.2, 0.9)))) for _ in range(count)]
    total, sizes = sum(lengths), torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    loss = torch.ones(total, dtype=torch.bool)
    loss[starts] = False
    ids = torch.randint(2, vocabulary, (total,), dtype=torch.int32)
    report = Report(count, count, total, int(loss.sum()), 0, max(lengths), 0, 0)
    return Encoded(
        ids, loss, starts, sizes, torch.zeros(count, dtype=torch.int64), [str(i) for i in range(count)], report
    )


def padded(data: Encoded, order: list[int], tokens: int) -> Iterator[dict[str, Any]]:
    """Batches of rows in this order, each of up to `tokens` tokens with its padding."""
    collate, chosen, longest = Collator(0), list[int](), 0
    lengths = data.lengths.tolist()
    for index in order:
        longest = max(longest, lengths[index])
        if chosen and longest * (len(chosen) + 1) > tokens:
            yield collate([data[i] for i in chosen])
            chosen, longest = [], lengths[index]
        chosen.append(index)
    yield collate([data[i] for i in chosen])


def packs(model: nn.Module, data: Encoded, longest: int, tokens: int) -> Iterator[dict[str, Any]]:
    """Batches of packs, each of about `tokens` tokens."""
    packed, each, collate = Packed(data, longest), tokens // longest, packed_collator(model, 0)
    for start in range(0, len(packed), each):
        yield collate([packed[i] for i in range(start, min(start + each, len(packed)))])


def main() -> None:
    quick = setup(__doc__ or "")
    count, longest, tokens = (20, 64, 128) if quick else (80, 512, 1024)
    model = with_reparam(llama(Shape(64, 96, 1, 2, 500) if quick else Shape(512, 1376, 4, 8, 4096)))
    data = rows(count, longest, model.config.vocab_size)
    shuffled = random.Random(1).sample(range(count), count)
    by_length = torch.argsort(data.lengths).tolist()
    ways = {
        "padded": lambda: padded(data, shuffled, tokens),
        "grouped by length": lambda: padded(data, by_length, tokens),
        "packed": lambda: packs(model, data, longest, tokens),
    }
    print("| batches | forward passes | tokens of rows, of all | tokens of rows per CPU second | over padded |")
    print("|---|---|---|---|---|")
    reference = None
    with ChunkedLoss(model):
        for name, batches in ways.items():
            made = list(batches())
            begin = time.process_time()
            for batch in made:
                model(**{key: value for key, value in batch.items() if key != "row"}).loss.backward()
            speed = data.report.tokens / (time.process_time() - begin)
            reference = reference or speed
            share = data.report.tokens / sum(batch["input_ids"].numel() for batch in made)
            print(f"| {name} | {len(made)} | {share:.0%} | {speed:,.0f} | {speed / reference:.2f} |", flush=True)


if __name__ == "__main__":
    main()
