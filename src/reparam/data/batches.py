"""The dataset of encoded rows, and the collator that makes padded batches.

Shapes: E examples (an example is a row, or a piece of a long text row), T tokens of an example, B examples in a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from reparam.core.text import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that cross entropy ignores
BLOCK = 1 << 22  # tokens that a digest reads at a time


@dataclass(frozen=True)
class Report:
    """Counts of an encoded data set, and the warnings about it."""

    rows: int
    """Number of rows that have examples."""
    examples: int
    """Number of examples per epoch: rows, and pieces of long rows."""
    tokens: int
    loss_tokens: int
    """Number of tokens whose prediction counts in the loss."""
    text_bytes: int
    """UTF-8 bytes that the loss tokens of text rows represent; 0 without text rows."""
    longest: int
    """Length of the longest row in tokens, before truncation and splitting."""
    truncated: int
    """Number of rows that lost loss tokens because they exceed `max_length`."""
    split: int
    """Number of rows that were split into pieces, and of chats split into one example for each answer."""
    dropped: int = 0
    """Number of rows that were left out, because they are too long or cannot be trained on."""
    lines: tuple[str, ...] = ()
    """What is taken from each source of several, and where the encoded rows are kept."""
    unused: tuple[str, ...] = ()
    """Keys of the rows and of their messages that change nothing in the examples."""
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        share = self.loss_tokens / self.tokens
        parts = [
            counted(self.rows, "row"),
            f"{counted(self.tokens, 'token')}, {self.loss_tokens:,} of them with loss ({share:.0%})",
            f"longest row {self.longest:,}",
        ]
        if self.truncated:
            parts.append(f"{counted(self.truncated, 'row')} truncated")
        if self.dropped:
            parts.append(f"{counted(self.dropped, 'row')} left out")
        if self.split:
            parts.append(f"{counted(self.split, 'row')} split, {self.examples:,} examples in all")
        if self.unused:
            parts.append(f"not used: {', '.join(self.unused)}")
        return "; ".join(parts)


@dataclass(frozen=True, eq=False)
class Encoded(Dataset[dict[str, Tensor]]):
    """A map-style dataset of examples, stored in flat tensors. `encoded[i]` is a dict of

    input_ids [T] int64, labels [T] int64 (the token id, or -100 for tokens without loss), row [] int64 (the index i)
    and, if the data has tasks, task [] int64.

    The examples are ranges of `ids`, in any order: several data sets can share the same tokens, which may be a file
    that is mapped into memory. Raises IndexError for an index outside 0 ... E - 1.
    """

    ids: Tensor
    """Token ids, [N] int32."""
    loss: Tensor
    """Which tokens carry loss, [N] bool. False for the first token of each example: nothing predicts it."""
    starts: Tensor
    """Index in `ids` at which each example begins, [E] int64."""
    lengths: Tensor
    """Number of tokens of each example, [E] int64."""
    text_bytes: Tensor
    """UTF-8 bytes that the loss tokens of a text row represent, [E] int64; 0 for other rows. Used for bits per byte."""
    sources: Sequence[str]
    """Where each example comes from, as "file:line", [E]."""
    report: Report
    tasks: Tensor | None = None
    """Number of each example's task, [E] int64, for methods that depend on the task."""

    def __len__(self) -> int:
        return len(self.lengths)

    def digest(self) -> str:
        """SHA-256 of all examples, in their order: token ids, loss, lengths and tasks."""
        found = hashlib.sha256()
        for tensor in (self.lengths, self.tasks):
            if tensor is not None:
                found.update(tensor.contiguous().numpy().data)
        ends = self.starts + self.lengths
        gaps = (torch.nonzero(self.starts[1:] != ends[:-1]).flatten() + 1).tolist()
        for first, last in pairwise([0, *gaps, len(self)]):  # examples that follow each other are read at once
            for start in range(int(self.starts[first]), int(ends[last - 1]), BLOCK):
                piece = slice(start, min(start + BLOCK, int(ends[last - 1])))
                found.update(self.ids[piece].numpy().data)
                found.update(self.loss[piece].numpy().data)
        return found.hexdigest()

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        start = int(self.starts[index])
        piece = slice(start, start + int(self.lengths[index]))
        ids = self.ids[piece].long()
        example = {
            "input_ids": ids,
            "labels": ids.masked_fill(~self.loss[piece], IGNORED),
            "row": torch.tensor(index),
        }
        return example if self.tasks is None else {**example, "task": self.tasks[index]}


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token id to pad with. Any id works, because padding is masked by position."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in candidates if i is not None)


@dataclass(frozen=True)
class Collator:
    """Makes a batch of examples, padded on the right to the longest one.

    A batch has input_ids, labels (-100 at padding) and attention_mask, all [B, T] int64; row [B] int64, the indices of
    the examples, so that an error message about a loss that is not finite can name them; and, if the examples have
    tasks, task [B] int64, which an adapter that depends on the task removes from the model's arguments. Padding is
    masked by position, not by id, so an end token that is also the pad token keeps its loss.

    Models do not accept `row`: remove it before the forward pass. With transformers' Trainer
    (remove_unused_columns=False), do so in `compute_loss`, which training and evaluation share:

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            rows = inputs.pop("row")
            ...

    >>> a = {"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([-100, 6, 7]), "row": torch.tensor(0)}
    >>> b = {"input_ids": torch.tensor([8, 7]), "labels": torch.tensor([-100, 7]), "row": torch.tensor(1)}
    >>> Collator(pad_id=7)([a, b])["labels"].tolist()
    [[-100, 6, 7], [-100, 7, -100]]
    """

    pad_id: int
    multiple_of: int = 1
    """The padded length is rounded up to a multiple of this number; 8 suits tensor cores."""

    def __call__(self, examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Collate examples into one batch of tensors."""
        longest = max(len(e["input_ids"]) for e in examples)
        size = (len(examples), -(-longest // self.multiple_of) * self.multiple_of)
        ids = torch.full(size, self.pad_id, dtype=torch.int64)  # [B, T]
        labels = torch.full(size, IGNORED, dtype=torch.int64)  # [B, T]
        mask = torch.zeros(size, dtype=torch.int64)  # [B, T]
        for i, example in enumerate(examples):
            length = len(example["input_ids"])
            ids[i, :length] = example["input_ids"]
            labels[i, :length] = example["labels"]
            mask[i, :length] = 1
        rows = torch.stack([e["row"] for e in examples])  # [B]
        batch = {"input_ids": ids, "labels": labels, "attention_mask": mask, "row": rows}
        return {**batch, "task": torch.stack([e["task"] for e in examples])} if "task" in examples[0] else batch
