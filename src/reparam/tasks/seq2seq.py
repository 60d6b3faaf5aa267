"""Sequence to sequence: an encoder reads the input, and a decoder writes the answer, as in T5 and BART."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.core.progress import tracked
from reparam.data.batches import IGNORED, padding_id
from reparam.data.examples import Examples, Features, Item
from reparam.errors import DataError
from reparam.evaluation.score import Score, share
from reparam.io.head import Head
from reparam.tasks import metrics
from reparam.tasks.columns import texts
from reparam.tasks.task import Prediction, Task, inputs_of, padded_texts, padded_with_labels

NAMES = (("input", "target"), ("prompt", "completion"), ("source", "target"), ("instruction", "output"))


class Seq2seq(Task):
    """The task seq2seq. A row is {"input": ..., "target": ...} or {"prompt": ..., "completion": ...}."""

    name = "seq2seq"
    metrics = ("loss", "exact_match", "rouge_l")
    libraries = ("rouge_score",)
    expected = '"input" and "target", or "prompt" and "completion"'

    def item(self, given: dict[str, Any], source: str, *, bare: bool) -> Item:
        """The row that an object holds."""
        if isinstance(given.get("translation"), dict):  # as in data sets of translations
            pair = list(given["translation"])
            given = {**given["translation"], **{key: value for key, value in given.items() if key != "translation"}}
            names: Sequence[str] = pair[:2]
        else:
            names = next((own for own in NAMES if own[0] in given), NAMES[0])
        if isinstance(given.get("messages"), list):
            raise DataError(
                [f"{source}: chats are for causal language models; give {self.expected}, or leave out --task"]
            )
        found = texts(given, source, names, least=1 if bare else 2)
        columns = {key: value for key, value in given.items() if key not in found}
        return Item(source, (given[found[0]],), given[found[1]] if len(found) > 1 else None, columns)

    def features(self, items: Sequence[Item], tokenizer: Any, head: Head) -> list[dict[str, Any]]:
        """input_ids, and labels with the end token of the target."""
        found = []
        for item in items:
            features: dict[str, Any] = {"input_ids": list(tokenizer(item.texts[0])["input_ids"]), "decodes": True}
            labels = [] if item.target is None else list(tokenizer(text_target=item.target)["input_ids"])
            end = tokenizer.eos_token_id
            if item.target is not None and end is not None and labels[-1:] != [end]:
                labels.append(end)
            found.append(features | {"labels": labels} if item.target is not None else {**features, "decodes": False})
        return found

    def cut(self, item: Item, features: dict[str, Any], tokenizer: Any, most: int) -> dict[str, Any]:
        """Cut both texts, and keep the end tokens."""
        made: dict[str, Any] = {
            key: _cut(features[key], most, tokenizer) for key in ("input_ids", "labels") if key in features
        }
        return {**features, **made}

    def collate(self, examples: Sequence[Features], pad: int) -> dict[str, Tensor]:
        """input_ids and attention_mask [B, T], and labels [B, U]."""
        return padded_with_labels(examples, pad)

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor], head: Head) -> Tensor:
        """Logits [B, U, V] of the target; the model shifts it by one to get the decoder's inputs."""
        if "labels" not in batch:
            return torch.empty(len(batch["input_ids"]), 0)
        found: Tensor = model(**inputs_of(batch), labels=batch["labels"], use_cache=False).logits
        return found

    def losses(self, outputs: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """Cross entropy of each token of the target, [N]."""
        counts = labels != IGNORED
        return F.cross_entropy(outputs[counts].float(), labels[counts], reduction="none")

    def apart(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """Nothing: logits of a vocabulary would not fit into memory, and scores need generated texts."""
        return [torch.empty(0)] * len(batch["input_ids"])

    def scores(self, outputs: Sequence[Tensor], examples: Examples, head: Head, **context: Any) -> tuple[Score, ...]:
        """Exact matches and ROUGE-L of greedy answers to the first `answers` rows; None for all rows."""
        count = context.get("answers")
        chosen = range(len(examples) if count is None else min(count, len(examples)))
        if not chosen:
            return ()
        given = _answers(examples, chosen, **context)
        expected = [str(examples.items[i].target) for i in chosen]
        right = sum(want.strip() == got.strip() for want, got in zip(expected, given, strict=True))
        return share("exact match", right, len(given)), metrics.rouge(expected, given)

    def predictions(
        self, outputs: Sequence[Tensor], examples: Examples, head: Head, **context: Any
    ) -> list[Prediction]:
        """The greedy answer to each row."""
        given = _answers(examples, range(len(examples)), **context)
        return [Prediction(item.source, text, item.target) for item, text in zip(examples.items, given, strict=True)]


@torch.no_grad()
def _answers(examples: Examples, chosen: Sequence[int], **context: Any) -> list[str]:
    """Greedy answers of the model with the selected adapter, of at most the longest target's length and 8 tokens."""
    model, tokenizer, size = context["model"], context["tokenizer"], context["batch"]
    device, pad = next(model.parameters()).device, padding_id(tokenizer)
    longest = context.get("new_tokens") or 8 + max(len(examples.features[i].get("labels", ())) for i in chosen)
    if not any("labels" in examples.features[i] for i in chosen):
        longest = context.get("new_tokens") or 128
    found: dict[int, str] = {}
    order = sorted(chosen, key=lambda i: len(examples.features[i]["input_ids"]))
    for start in tracked(range(0, len(order), size), "generating answers", unit="batches"):
        own = order[start : start + size]
        batch = padded_texts([{"input_ids": examples.features[i]["input_ids"]} for i in own], pad)
        out = model.generate(
            **{key: value.to(device) for key, value in batch.items()},
            max_new_tokens=longest,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
        )
        for i, text in zip(own, tokenizer.batch_decode(out[:, 1:], skip_special_tokens=True), strict=True):
            found[i] = text
    return [found[i] for i in chosen]


def _cut(ids: list[int], most: int, tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return [*ids[: most - 1], end] if len(ids) > most and ids[-1] == end else ids[:most]
