"""Classification of texts and of pairs of texts, and regression: a class or a number for each row, as in GLUE."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.data.examples import Examples, Features, Item
from reparam.errors import DataError
from reparam.evaluation.score import Score, share
from reparam.io.head import Head
from reparam.tasks import metrics
from reparam.tasks.columns import first_of, texts
from reparam.tasks.labels import check_known, counted_labels, labels_for, place_of
from reparam.tasks.task import Prediction, Task, inputs_of, padded_texts

KEYS = ("label", "labels", "score", "class", "category", "intent", "target")
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")


class Classification(Task):
    """The task classification. A row is {"text": ..., "label": ...}, with "text_pair" for a pair of texts.

    Labels are names, whole numbers or true and false; numbers with a fraction make it a regression.
    """

    name = "classification"
    metrics = ("loss", "accuracy", "f1", "f1_macro", "matthews", "pearson", "spearman")
    libraries = ("sklearn", "scipy")
    expected = '"text" (and "text_pair") and "label"'

    def item(self, given: dict[str, Any], source: str, *, bare: bool) -> Item:
        """The row that an object holds."""
        key = first_of(given, KEYS)
        own = [] if key is None else [key]
        found = texts(given, source, ("text", "text_pair"), least=1, without=own)
        columns = {k: v for k, v in given.items() if k not in (*found, *own)}
        value = given[key] if key is not None else None
        if value is None and not bare:
            raise DataError([f'{source}: no "label"; give each row one, or name its key: --data.columns label=KEY'])
        if value is not None and not isinstance(value, str | int | float):
            raise DataError([f'{source}: "{key}" must be a name or a number, got {type(value).__name__}'])
        if isinstance(value, float) and not math.isfinite(value):
            raise DataError([f'{source}: "{key}" is {value}; expected a finite number'])
        if isinstance(value, int) and value < 0 and not isinstance(value, bool):
            raise DataError([f'{source}: "{key}" is {value}; a negative class usually marks a row without a label'])
        if isinstance(value, bool):
            value = str(value).lower()
        return Item(source, tuple(given[k] for k in found), value, columns)

    def head(self, items: Sequence[Item], known: tuple[str, ...] | None, **settings: Any) -> Head:
        """Classes, or a regression if a target is a number with a fraction."""
        targets = [item.target for item in items]
        floats = [target for target in targets if isinstance(target, float)]
        words = [target for target in targets if isinstance(target, str)]
        fractions = len(words) == len(targets) and all(map(_NUMBER.fullmatch, words)) and any("." in x for x in words)
        if fractions or (floats and not words):
            return Head("classification", regression=True, **settings)
        return Head("classification", labels_for(items, targets, known), **settings)

    def check_targets(self, items: Sequence[Item], head: Head) -> None:
        """Raise DataError for labels that the head does not have, and for names where it has a number."""
        if not head.regression:
            check_known(items, [[item.target] for item in items if item.target is not None], head)
            return
        wrong = [item for item in items if item.target is not None and not _is_number(item.target)]
        if wrong:
            raise DataError([f"{item.source}: the label {item.target!r} is no number" for item in wrong])

    def features(self, items: Sequence[Item], tokenizer: Any, head: Head) -> list[dict[str, Any]]:
        """input_ids, token_type_ids if the tokenizer gives them, and labels."""
        found = [self._encoded(item, tokenizer) for item in items]
        for item, features in zip(items, found, strict=True):
            if item.target is not None:
                number = float(item.target) if head.regression else place_of(item.target, head.labels)
                features["labels"] = number
        return found

    def cut(self, item: Item, features: dict[str, Any], tokenizer: Any, most: int) -> dict[str, Any]:
        """Cut the longer text of a pair first, as transformers does by default."""
        made = self._encoded(item, tokenizer, truncation="longest_first", max_length=most)
        return {**features, **made}

    def _encoded(self, item: Item, tokenizer: Any, **settings: Any) -> dict[str, Any]:
        separates = tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False)
        given = item.texts if separates else ("\n".join(item.texts),)
        made = tokenizer(*given, return_attention_mask=False, **settings)
        return {key: list(made[key]) for key in ("input_ids", "token_type_ids") if key in made}

    def described(self, items: Sequence[Item], head: Head) -> str:
        """The classes with their numbers of rows, or the range of the numbers."""
        targets = [item.target for item in items if item.target is not None]
        if head.regression:
            numbers = [float(target) for target in targets]
            return f"numbers from {min(numbers):g} to {max(numbers):g}" if numbers else ""
        return counted_labels(targets, head.labels)

    def collate(self, examples: Sequence[Features], pad: int) -> dict[str, Tensor]:
        """input_ids and attention_mask [B, T], and labels [B]: int64, or float32 for numbers."""
        made = padded_texts(examples, pad)
        if all("labels" in example for example in examples):
            made["labels"] = torch.tensor([example["labels"] for example in examples])
        return made

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor], head: Head) -> Tensor:
        """Logits [B, classes], or [B, 1] for a number."""
        found: Tensor = model(**inputs_of(batch)).logits
        return found

    def losses(self, outputs: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """Cross entropy, or the squared error of numbers, [B]."""
        if labels.is_floating_point():
            return (outputs[:, 0].float() - labels) ** 2
        return F.cross_entropy(outputs.float(), labels, reduction="none")

    def scores(self, outputs: Sequence[Tensor], examples: Examples, head: Head, **context: Any) -> tuple[Score, ...]:
        """Accuracy, F1 and Matthews' correlation; for numbers, Pearson's and Spearman's correlation."""
        expected = [features["labels"] for features in examples.features]
        if head.regression:
            return tuple(metrics.of_numbers(expected, [float(output[0]) for output in outputs]))
        given = [int(output.argmax()) for output in outputs]
        right = sum(want == got for want, got in zip(expected, given, strict=True))
        accuracy = share("accuracy", right, len(given))
        return accuracy, *metrics.of_classes(expected, given, len(head.labels))

    def predictions(
        self, outputs: Sequence[Tensor], examples: Examples, head: Head, **context: Any
    ) -> list[Prediction]:
        """The likeliest class with the probabilities of all, or the number."""
        found = []
        for item, output in zip(examples.items, outputs, strict=True):
            if head.regression:
                found.append(Prediction(item.source, float(output[0]), item.target))
                continue
            shares = dict(zip(head.labels, output.softmax(0).tolist(), strict=True))
            best = head.labels[int(output.argmax())]
            place = place_of(item.target, head.labels)
            expected = None if place is None else head.labels[place]
            found.append(Prediction(item.source, best, expected, {"probabilities": shares}))
        return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or _NUMBER.fullmatch(value) is not None
