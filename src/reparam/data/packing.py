"""Packing: several short examples end to end in one row, so that a batch has little padding.

The tokens of a pack see only those of their own example if the model gets the position ids of `PackedCollator`, which
start again at each example, and no attention mask. `reparam.hf.packed` finds out whether a model keeps them apart.

Shapes: K packs, T tokens of a pack, B packs in a batch.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from reparam.core.text import counted
from reparam.data.batches import IGNORED, Encoded


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Distribute examples over packs of up to `size` tokens: the longest first, each into the fullest pack it fits.

    This is best-fit decreasing, as in TRL (Ding et al. 2024, arXiv 2404.10830). `lengths` are those of the examples,
    each from 1 to `size`. Returns the indices of the examples of each pack.

    >>> best_fit([2, 5, 3, 1], 6)
    [[1, 3], [2, 0]]
    """
    packs: list[list[int]] = []
    with_space: dict[int, deque[int]] = defaultdict(deque)  # space left -> numbers of packs
    spaces = 0  # bit s is set if a pack has a space of s
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1  # the smallest that is large enough
            number = with_space[space].popleft()
            if not with_space[space]:
                spaces ^= 1 << space
        else:
            space, number = size, len(packs)
            packs.append([])
        packs[number].append(index)
        if left := space - length:
            with_space[left].append(number)
            spaces |= 1 << left
    return packs


class Packed(Dataset[dict[str, Tensor]]):
    """The examples of a dataset in packs of up to `size` tokens. They are the same for the same examples and size.

    Item k is a dictionary of input_ids, labels and position_ids, all [T] int64, and row, the indices of its examples.
    If the examples have tasks, it also has task [T] int64, for each token that of its example.
    """

    def __init__(self, examples: Encoded, size: int) -> None:
        self.examples, self.size = examples, size
        self.packs = best_fit(examples.lengths.tolist(), size)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        parts = [self.examples[i] for i in self.packs[index]]
        pack = {
            "input_ids": torch.cat([part["input_ids"] for part in parts]),
            "labels": torch.cat([part["labels"] for part in parts]),
            "position_ids": torch.cat([torch.arange(len(part["input_ids"])) for part in parts]),
            "row": torch.stack([part["row"] for part in parts]),
        }
        if self.examples.tasks is not None:
            pack["task"] = torch.cat([part["task"].expand(len(part["input_ids"])) for part in parts])
        return pack

    def __str__(self) -> str:
        tokens = int(self.examples.lengths.sum())
        return (
            f"{counted(len(self.examples), 'example')} in {counted(len(self), 'pack')} of up to {self.size:,} tokens, "
            f"{tokens / (len(self) * self.size):.0%} full"
        )


@dataclass(frozen=True)
class PackedCollator:
    """Makes a batch of packs.

    A batch has input_ids, labels (-100 at padding) and position_ids (0 at padding), all [B, T] int64, task [B, T] if
    the packs have one, and row, the indices of all examples, int64. It has no attention mask: models of transformers
    derive the examples from the position ids, which only works without a mask and a cache, so use_cache is False. A
    token of padding sees itself alone.

    With `flat`, the packs are end to end in one row, [1, T]: FlashAttention computes such sequences of several lengths.
    """

    pad_id: int
    flat: bool = False

    def __call__(self, packs: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        """Collate packs into one batch."""

        def joined(key: str, padding: int) -> Tensor:
            values = [pack[key] for pack in packs]
            return torch.cat(values)[None] if self.flat else pad_sequence(values, True, padding)

        batch = {
            "input_ids": joined("input_ids", self.pad_id),
            "labels": joined("labels", IGNORED),
            "position_ids": joined("position_ids", 0),
            "row": torch.cat([pack["row"] for pack in packs]),
            "use_cache": False,
        }
        return {**batch, "task": joined("task", 0)} if "task" in packs[0] else batch
