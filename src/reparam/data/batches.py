"""Encoded rows as a dataset, and the collator that makes padded batches of them.

E examples (a row, or a piece of a long text row), T tokens of one example, B examples in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that cross entropy leaves out


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "row"), counted(1200, "row")
    ('1 row', '1,200 rows')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


@dataclass(frozen=True)
class Report:
    """What encoding found."""

    rows: int
    examples: int
    """Rows and pieces of rows that one epoch goes through."""
    tokens: int
    loss_tokens: int
    """Tokens that are predicted with loss."""
    text_bytes: int
    """UTF-8 bytes of text rows that these stand for; 0 for other rows."""
    longest: int
    """Tokens of the longest row before anything was cut or split."""
    truncated: int
    """Chats and completions that lost tokens with loss to `max_length`."""
    split: int
    """Text rows that became several pieces."""
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        share = self.loss_tokens / self.tokens
        parts = [
            counted(self.rows, "row"),
            f"{counted(self.tokens, 'token')}, {self.loss_tokens:,} of them with loss ({share:.0%})",
            f"longest row {self.longest:,}",
        ]
        if self.truncated:
            parts.append(f"{counted(self.truncated, 'row')} cut")
        if self.split:
            parts.append(f"{counted(self.split, 'row')} split, {self.examples:,} pieces in all")
        return "; ".join(parts)


@dataclass(frozen=True, eq=False)
class Encoded(Dataset[dict[str, Tensor]]):
    """A map-style dataset of examples, stored flat. `encoded[i]` has

    input_ids [T] int64, labels [T] int64 (the id, or -100 where there is no loss), row [] int64, which is i, and, where
    there are tasks, task [] int64.
    """

    ids: Tensor
    """[sum of T] int32."""
    loss: Tensor
    """[sum of T] bool. False for the first token of each example, which nothing predicts."""
    starts: Tensor
    """[E + 1] int64, where each example begins in `ids`."""
    text_bytes: Tensor
    """[E] int64, UTF-8 bytes that the loss tokens of a text row stand for, for bits per byte; 0 for other rows."""
    sources: Sequence[str]
    """[E] "file:line"."""
    report: Report
    tasks: Tensor | None = None
    """[E] int64, the number of the example's task, for methods that go by it."""

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        piece = slice(int(self.starts[index]), int(self.starts[index + 1]))
        ids = self.ids[piece].long()
        example = {
            "input_ids": ids,
            "labels": ids.masked_fill(~self.loss[piece], IGNORED),
            "row": torch.tensor(index),
        }
        return example if self.tasks is None else {**example, "task": self.tasks[index]}


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to fill up with. Any id will do, because padding is masked by its position."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in candidates if i is not None)


@dataclass(frozen=True)
class Collator:
    """Makes a batch of examples, filled up on the right to the longest.

    Padding is known by its position, never by its id, so an end token keeps its loss where it is also the pad token.
    The batch: input_ids, labels (-100 at padding), attention_mask, all [B, T] int64, and row [B] int64, the numbers
    of the examples, so that a loss that is not finite can name its rows; and task [B] int64 where the examples have
    one, which an adapter that goes by tasks takes out of the model's arguments. Models take no `row`: pop it before the
    forward pass. With transformers' Trainer (remove_unused_columns=False) the place is `compute_loss`, which training
    and evaluation share:

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
    """The padded length is a multiple of this; 8 suits tensor cores."""

    def __call__(self, examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The batch of these examples."""
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
