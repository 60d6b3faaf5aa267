"""Embeddings: texts that belong together get similar vectors, and the other texts of a batch dissimilar ones.

The loss is MultipleNegativesRankingLoss of sentence-transformers: the cross entropy of finding the positive of each
anchor, by cosine similarity, among all positives and negatives of the batch.
"""

from __future__ import annotations

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
from reparam.tasks.columns import texts
from reparam.tasks.task import Prediction, Task, inputs_of, padded_texts

NAMES = ("anchor", "positive", "negative")
DEPTHS = (1, 5, 10)


class Embedding(Task):
    """The task embedding. A row is {"anchor": ..., "positive": ...}, with "negative" for a text that must differ."""

    name = "embedding"
    metrics = ("loss", "recall_at_1", "recall_at_5", "recall_at_10", "mrr")
    expected = '"anchor" and "positive" (and "negative")'

    def item(self, given: dict[str, Any], source: str, *, bare: bool) -> Item:
        """The row that an object holds: its anchor, its positive, and its negative if it has one."""
        if bare and "anchor" not in given and isinstance(given.get("text"), str):
            given = {"anchor": given["text"], **{key: value for key, value in given.items() if key != "text"}}
        found = texts(given, source, NAMES, least=1 if bare else 2)
        columns = {key: value for key, value in given.items() if key not in found}
        return Item(source, tuple(given[key] for key in found), None, columns)

    def head(self, items: Sequence[Item], known: tuple[str, ...] | None, **settings: Any) -> Head:
        """An embedding, with its pooling. Raises DataError if only some rows have a negative."""
        self.check_targets(items, Head("embedding"))
        return Head("embedding", **settings)

    def check_targets(self, items: Sequence[Item], head: Head) -> None:
        """Raise DataError if only some rows have a negative."""
        usual = len(items[0].texts)
        odd = [item for item in items if len(item.texts) != usual]
        if odd:
            raise DataError(
                [
                    f"{odd[0].source}: {len(odd[0].texts)} texts, and {items[0].source} has {usual}; give a negative "
                    f"to all rows or to none"
                ]
            )

    def features(self, items: Sequence[Item], tokenizer: Any, head: Head) -> list[dict[str, Any]]:
        """`input_ids`: a list of token ids for each text."""
        return [{"input_ids": [list(tokenizer(text)["input_ids"]) for text in item.texts]} for item in items]

    def cut(self, item: Item, features: dict[str, Any], tokenizer: Any, most: int) -> dict[str, Any]:
        """Cut each text."""
        made = [list(tokenizer(text, truncation=True, max_length=most)["input_ids"]) for text in item.texts]
        return {**features, "input_ids": made}

    def collate(self, examples: Sequence[Features], pad: int) -> dict[str, Tensor]:
        """input_ids and attention_mask [n · B, T]: all anchors, then all positives, then all negatives; labels [B]."""
        count = len(examples[0]["input_ids"])
        rows = [{"input_ids": example["input_ids"][i]} for i in range(count) for example in examples]
        return {**padded_texts(rows, pad), "labels": torch.arange(len(examples))}

    def batch(self, examples: Sequence[Mapping[str, Any]], pad: int) -> dict[str, Tensor]:
        """With the task of each text."""
        made = super().batch(examples, pad)
        if "task" in made:
            made["task"] = made["task"].repeat(len(examples[0]["input_ids"]))
        return made

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor], head: Head) -> Tensor:
        """Vectors of length 1, [n · B, H]."""
        hidden = model(**inputs_of(batch)).last_hidden_state
        return F.normalize(pooled(hidden, batch["attention_mask"], head.pooling).float(), dim=-1)

    def losses(self, outputs: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """The loss of each anchor, [B]."""
        anchors, candidates = outputs[: len(labels)], outputs[len(labels) :]
        return F.cross_entropy(anchors @ candidates.T / temperature, labels, reduction="none")

    def apart(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """The vectors of each example, [n, H]."""
        return list(outputs.view(-1, len(batch["row"]), outputs.shape[-1]).transpose(0, 1))

    def scores(self, outputs: Sequence[Tensor], examples: Examples, head: Head, **context: Any) -> tuple[Score, ...]:
        """How often the positive of an anchor is among the nearest of all positives and negatives of the rows.

        A text that is the positive of several anchors counts once, and as right for each of them.
        """
        vectors = torch.stack(list(outputs)).double()  # [E, n, H]
        places: dict[str, int] = {}
        unique: list[Tensor] = []
        right: list[int] = []
        for column in range(1, vectors.shape[1]):
            for row, item in enumerate(examples.items):
                if item.texts[column] not in places:
                    places[item.texts[column]] = len(unique)
                    unique.append(vectors[row, column])
                if column == 1:
                    right.append(places[item.texts[1]])
        similar = vectors[:, 0] @ torch.stack(unique).T
        own = similar.gather(1, torch.tensor(right)[:, None])
        above, equal = (similar > own).sum(1), (similar == own).sum(1) - 1
        ranks = (above + equal + 1).tolist()  # texts of the same similarity count against the positive
        found = [
            share(f"recall at {depth}", sum(rank <= depth for rank in ranks), len(ranks))
            for depth in DEPTHS
            if depth == 1 or len(unique) > depth
        ]
        return *found, metrics.mean("mrr", [1 / rank for rank in ranks])

    def predictions(
        self, outputs: Sequence[Tensor], examples: Examples, head: Head, **context: Any
    ) -> list[Prediction]:
        """The vector of each text; with several texts, also their similarities to the first."""
        found = []
        for item, output in zip(examples.items, outputs, strict=True):
            similar = {"similarities": (output[1:] @ output[0]).tolist()} if len(output) > 1 else {}
            found.append(Prediction(item.source, output[0].tolist(), None, similar))
        return found


def pooled(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector for each text, [B, H], from those of its tokens, [B, T, H]; `mask` [B, T] is 0 at padding."""
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        places = torch.arange(mask.shape[1], device=mask.device)
        return hidden[torch.arange(len(hidden), device=hidden.device), (places * mask).argmax(1)]
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)
