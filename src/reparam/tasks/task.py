"""What a task is: how rows become examples, how batches become a loss, and how held-out rows are scored."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from reparam.adapter.context import told
from reparam.core.progress import tracked
from reparam.core.text import counted
from reparam.data.batches import IGNORED, padding_id
from reparam.data.examples import Examples, ExamplesReport, Features, Item, texts_of
from reparam.data.formats import renamed
from reparam.data.prompts import read_items
from reparam.data.tasks import task_numbers
from reparam.errors import DataError
from reparam.evaluation.score import Score
from reparam.io.head import Head

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model says about a row."""

    source: str
    given: Any
    """A label, a number, a text, a list of tags, or a vector."""
    expected: Any = None
    """What the row says; None if it does not."""
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further values, such as the probabilities of the classes."""


class Task(abc.ABC):
    """One value of `run.task`."""

    name: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    """The values of `run.metric`. Scores have these names, with spaces."""
    expected: ClassVar[str]
    """The keys of a row, for messages."""

    libraries: ClassVar[tuple[str, ...]] = ()
    """The libraries that the scores need, by the names that Python imports."""

    def read(self, source: str | Path, columns: Mapping[str, str], *, bare: bool = False) -> list[Item]:
        """Read the rows of a file, a glob, a folder, a data set or standard input, as `read_rows` reads rows.

        With `bare`, rows may lack what is expected of them. Raises DataError, with all problems and their places.
        """
        return read_items(
            source,
            lambda value, place: [self.item(renamed(value, place, columns), place, bare=bare)],
            expected=self.expected,
        )

    @abc.abstractmethod
    def item(self, given: dict[str, Any], source: str, *, bare: bool) -> Item:
        """The row that an object holds, under the keys of the task or those found by content."""

    def head(self, items: Sequence[Item], known: tuple[str, ...] | None, **settings: Any) -> Head:
        """What the model must be for, to be trained on these rows.

        `known` are the labels in the files of a base that is a classifier, which are kept if all rows have one of them.
        Raises DataError for targets that do not fit each other.
        """
        return Head(self.name, **settings)  # type: ignore[arg-type]

    def check_targets(self, items: Sequence[Item], head: Head) -> None:
        """Raise DataError, with all places, for rows whose target the head does not have."""
        return

    @abc.abstractmethod
    def features(self, items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, head: Head) -> list[dict[str, Any]]:
        """The examples of the rows, of any length: token ids, and `labels` where the row says what is expected."""

    @abc.abstractmethod
    def cut(self, item: Item, features: dict[str, Any], tokenizer: Any, most: int) -> dict[str, Any]:
        """The example with at most `most` tokens in each of its texts."""

    def encode(
        self,
        items: Sequence[Item],
        tokenizer: PreTrainedTokenizerBase,
        head: Head,
        *,
        too_long: str = "auto",
        tasks: Sequence[str] = (),
    ) -> Examples:
        """Encode rows. Texts longer than `head.max_length` tokens are cut, refused or left out, as `too_long` says.

        `tasks` are the names of the tasks of a method that depends on them. Raises DataError for rows without tokens,
        for long ones with `too_long="error"`, and if none is left.
        """
        self.check_targets(items, head)
        found = self.features(items, tokenizer, head)
        most, kept, problems = head.max_length, [], []
        truncated = dropped = 0
        for item, features in zip(items, found, strict=True):
            lengths = [len(ids) for ids in texts_of(features)]
            if not all(lengths):
                problems.append(f"{item.source}: a text has no tokens")
            elif most is not None and max(lengths) > most:
                if too_long == "error":
                    problems.append(
                        f"{item.source}: {max(lengths):,} tokens, more than data.max_length or the model allow ({most})"
                    )
                elif too_long == "drop":
                    dropped += 1
                else:
                    truncated += 1
                    kept.append((item, self.cut(item, features, tokenizer, most)))
            else:
                kept.append((item, features))
        if not kept and not problems:
            problems.append(f"all {counted(len(items), 'row')} are longer than {most} tokens, so none is left")
        if problems:
            raise DataError(problems)
        left, made = [item for item, _ in kept], [features for _, features in kept]
        if tasks:
            numbers = task_numbers(left, tasks)  # type: ignore[arg-type]
            made = [{**features, "task": number} for features, number in zip(made, numbers, strict=True)]
        lengths = [sum(map(len, texts_of(features))) for features in made]
        report = ExamplesReport(
            rows=len(left),
            examples=len(left),
            tokens=sum(lengths),
            loss_tokens=len(left),
            text_bytes=0,
            longest=max(len(ids) for features in found for ids in texts_of(features)),
            truncated=truncated,
            split=0,
            dropped=dropped,
            targets=self.described(left, head),
        )
        return Examples(made, left, report)

    def described(self, items: Sequence[Item], head: Head) -> str:
        """What is expected of these rows, in a few words."""
        return ""

    @abc.abstractmethod
    def collate(self, examples: Sequence[Features], pad: int) -> dict[str, Tensor]:
        """A batch of tensors, with `labels` if the examples have them; texts are padded with the token `pad`."""

    def batch(self, examples: Sequence[Mapping[str, Any]], pad: int) -> dict[str, Tensor]:
        """As `collate`, with `row` [B] and, for methods that depend on it, `task` [B]."""
        made = self.collate(examples, pad)
        made["row"] = torch.stack([example["row"] for example in examples])
        if "task" in examples[0]:
            made["task"] = torch.tensor([example["task"] for example in examples])
        return made

    @abc.abstractmethod
    def forward(self, model: nn.Module, batch: Mapping[str, Tensor], head: Head) -> Tensor:
        """What the model computes for a batch: logits, or vectors."""

    @abc.abstractmethod
    def losses(self, outputs: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """The loss of each target, one for each label that is not -100, [N]; the loss of a batch is their mean.

        Similarities are divided by the `temperature`.
        """

    @abc.abstractmethod
    def scores(self, outputs: Sequence[Tensor], examples: Examples, head: Head, **context: Any) -> tuple[Score, ...]:
        """The scores beside the loss, the most usual first, from the outputs of each example.

        `context` has the model, the tokenizer and the batch size, for tasks that generate.
        """

    @abc.abstractmethod
    def predictions(
        self, outputs: Sequence[Tensor], examples: Examples, head: Head, **context: Any
    ) -> list[Prediction]:
        """What the outputs of each example say; `context` as for `scores`."""

    def outputs(
        self,
        model: nn.Module,
        examples: Examples,
        tokenizer: PreTrainedTokenizerBase,
        head: Head,
        *,
        batch: int,
        temperature: float = 0.05,
    ) -> tuple[list[Tensor], Tensor]:
        """The outputs of each example, in evaluation mode, on the CPU; and the loss of each target, [N] float64.

        Examples of similar length are in one batch.
        """
        order = sorted(range(len(examples)), key=lambda i: sum(map(len, texts_of(examples.features[i]))))
        found: list[Tensor] = [torch.empty(0)] * len(examples)
        losses: list[Tensor] = []
        for made in self._batches(model, examples, order, padding_id(tokenizer), batch):
            rows, labels = made["row"], made.get("labels")
            outputs = self.forward(model, made, head)
            if labels is not None:
                losses.append(self.losses(outputs, labels, temperature).double().cpu())
            for row, output in zip(rows.tolist(), self.apart(outputs, made), strict=True):
                found[row] = output.float().cpu()
        return found, torch.cat(losses) if losses else torch.empty(0, dtype=torch.float64)

    def apart(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """The outputs of each example of a batch."""
        return list(outputs)

    def _batches(
        self, model: nn.Module, examples: Examples, order: Sequence[int], pad: int, size: int
    ) -> Iterator[dict[str, Tensor]]:
        device, training = next(model.parameters()).device, model.training
        model.eval()
        for start in tracked(range(0, len(order), size), "scoring held-out rows", unit="batches"):
            made = self.batch([examples[i] for i in order[start : start + size]], pad)
            with torch.no_grad(), told(model, made):
                made.pop("task", None)
                yield {key: value if key == "row" else value.to(device) for key, value in made.items()}
        model.train(training)


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """A matrix [B, T] int64 of rows of different lengths, filled up on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def padded_texts(examples: Sequence[Features], pad: int) -> dict[str, Tensor]:
    """input_ids and attention_mask [B, T], and token_type_ids if the tokenizer gives them."""
    made = {
        "input_ids": padded([example["input_ids"] for example in examples], pad),
        "attention_mask": padded([[1] * len(example["input_ids"]) for example in examples], 0),
    }
    if "token_type_ids" in examples[0]:
        made["token_type_ids"] = padded([example["token_type_ids"] for example in examples], 0)
    return made


def padded_with_labels(examples: Sequence[Features], pad: int) -> dict[str, Tensor]:
    """As `padded_texts`, with the labels of each row [B, U], if all rows have some."""
    made = padded_texts(examples, pad)
    if all("labels" in example for example in examples):
        made["labels"] = padded([example["labels"] for example in examples], IGNORED)
    return made


def inputs_of(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a model takes of a batch: all but the labels and the numbers of the rows."""
    return {key: value for key, value in batch.items() if key not in ("labels", "row")}
