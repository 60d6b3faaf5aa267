"""Token classification: a tag for each word of a text, as for names and parts of speech.

The words are joined by spaces and tokenized as a text. The first token of a word carries its tag, the others none, as
in transformers' examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from reparam.data.batches import IGNORED
from reparam.data.examples import Examples, Features, Item
from reparam.data.messages import string_problem
from reparam.errors import DataError
from reparam.evaluation.score import Score, share
from reparam.io.head import Head
from reparam.tasks import metrics
from reparam.tasks.columns import first_of
from reparam.tasks.labels import check_known, counted_labels, labels_for, place_of
from reparam.tasks.task import Prediction, Task, inputs_of, padded_with_labels

WORDS = ("tokens", "words")
TAGS = ("tags", "ner_tags", "pos_tags", "labels", "label")


class TokenClassification(Task):
    """The task token-classification. A row is {"tokens": ["Ada", "sleeps"], "tags": ["B-PER", "O"]}."""

    name = "token-classification"
    metrics = ("loss", "accuracy", "f1_macro", "span_f1")
    libraries = ("sklearn", "seqeval")
    expected = '"tokens" and "tags"'

    def item(self, given: dict[str, Any], source: str, *, bare: bool) -> Item:
        """The row that an object holds."""
        keys = {
            name: name if name in given else first_of(given, own) for name, own in (("tokens", WORDS), ("tags", TAGS))
        }
        has = ", ".join(f'"{key}"' for key in list(given)[:6]) or "no keys"
        for name, key in keys.items():
            if key is None and not (bare and name == "tags"):
                raise DataError(
                    [f'{source}: no "{name}"; the row has {has}; name the key to read: --data.columns {name}=KEY']
                )
        words = given[keys["tokens"] or ""]
        tags = None if keys["tags"] is None else given[keys["tags"]]
        if not isinstance(words, list) or not words:
            raise DataError([f'{source}: "{keys["tokens"]}" must be a list of words, with one word at least'])
        for number, word in enumerate(words):
            if problem := string_problem(word, f'{source}: "{keys["tokens"]}"[{number}]'):
                raise DataError([problem])
            if not word.strip():
                raise DataError([f'{source}: "{keys["tokens"]}"[{number}] is empty; remove the word and its tag'])
        if tags is not None:
            plain = isinstance(tags, list) and all(isinstance(t, str | int) and not isinstance(t, bool) for t in tags)
            if not plain:
                raise DataError([f'{source}: "{keys["tags"]}" must be a list of names or whole numbers'])
            if len(tags) != len(words):
                raise DataError([f"{source}: {len(words)} words and {len(tags)} tags; give one tag for each word"])
        columns = {key: value for key, value in given.items() if key not in keys.values()}
        return Item(source, (words,), tags, columns)

    def head(self, items: Sequence[Item], known: tuple[str, ...] | None, **settings: Any) -> Head:
        """The tags of all rows."""
        targets = [tag for item in items for tag in item.target]
        return Head("token-classification", labels_for(items, targets, known), **settings)

    def check_targets(self, items: Sequence[Item], head: Head) -> None:
        """Raise DataError for tags that the head does not have."""
        check_known(items, [item.target for item in items if item.target is not None], head)

    def features(self, items: Sequence[Item], tokenizer: Any, head: Head) -> list[dict[str, Any]]:
        """input_ids, `words` (the number of the word that begins at each token, or -1), and labels."""
        if not tokenizer.is_fast:
            raise DataError([f"{items[0].source}: the tokenizer cannot tell which tokens a word has; use a fast one"])
        return [self._encoded(item, tokenizer, head) for item in items]

    def cut(self, item: Item, features: dict[str, Any], tokenizer: Any, most: int) -> dict[str, Any]:
        """Without the words that begin after the limit; special tokens at the end stay."""
        last = max(i for i, word in enumerate(features["words"]) if word >= 0)
        ends = 0
        while len(features["input_ids"]) - ends - 1 > last and features["special"][-1 - ends]:
            ends += 1
        size = len(features["input_ids"])
        keep = [*range(most - ends), *range(size - ends, size)]
        return {key: [values[i] for i in keep] for key, values in features.items()}

    def _encoded(self, item: Item, tokenizer: Any, head: Head) -> dict[str, Any]:
        (words,) = item.texts
        starts, text = [], ""
        for word in words:
            text += " " if text else ""
            starts.append(len(text))
            text += word
        made = tokenizer(
            text, return_offsets_mapping=True, return_attention_mask=False, return_special_tokens_mask=True
        )
        begins: list[int] = []
        next_word = 0
        for low, high in made["offset_mapping"]:
            # Some tokenizers count the space before a word as a part of its first token.
            first = next_word < len(words) and low < high and high > starts[next_word]
            if first and low < starts[next_word] + len(words[next_word]):
                begins.append(next_word)
                next_word += 1
                while next_word < len(words) and high > starts[next_word]:  # a token over several words
                    next_word += 1
                continue
            while first and next_word < len(words) and low >= starts[next_word] + len(words[next_word]):
                next_word += 1  # the tokenizer drops all characters of this word
            begins.append(-1)
        found: dict[str, Any] = {"input_ids": list(made["input_ids"]), "words": begins}
        found["special"] = list(made["special_tokens_mask"])
        if "token_type_ids" in made:
            found["token_type_ids"] = list(made["token_type_ids"])
        if item.target is not None:
            tags = [place_of(tag, head.labels) for tag in item.target]
            found["labels"] = [IGNORED if word < 0 else tags[word] for word in begins]
        return found

    def described(self, items: Sequence[Item], head: Head) -> str:
        """The tags with their numbers of words."""
        return counted_labels([tag for item in items for tag in item.target or ()], head.labels)

    def collate(self, examples: Sequence[Features], pad: int) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels, [B, T] int64."""
        return padded_with_labels(examples, pad)

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor], head: Head) -> Tensor:
        """Logits [B, T, tags]."""
        found: Tensor = model(**inputs_of(batch)).logits
        return found

    def losses(self, outputs: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """Cross entropy of each tagged token, [N]."""
        counts = labels != IGNORED
        return F.cross_entropy(outputs[counts].float(), labels[counts], reduction="none")

    def scores(self, outputs: Sequence[Tensor], examples: Examples, head: Head, **context: Any) -> tuple[Score, ...]:
        """Accuracy and macro F1 of the words, and the F1 of spans if the tags are those of spans (B-, I-)."""
        given = self._tags(outputs, examples)
        expected = [
            {word: label for word, label in zip(f["words"], f["labels"], strict=True) if word >= 0}
            for f in examples.features
        ]
        want = [tag for row in expected for tag in row.values()]
        got = [tags[word] for row, tags in zip(expected, given, strict=True) for word in row]
        found = [share("accuracy", sum(a == b for a, b in zip(want, got, strict=True)), len(want))]
        found += [score for score in metrics.of_classes(want, got, len(head.labels)) if score.name == "f1 macro"]
        if all(label == "O" or label[:2] in ("B-", "I-") for label in head.labels):
            named = [[head.labels[row[word]] for word in row] for row in expected]
            said = [[head.labels[tags[word]] for word in row] for row, tags in zip(expected, given, strict=True)]
            found.append(metrics.of_tags(named, said))
        return tuple(found)

    def predictions(
        self, outputs: Sequence[Tensor], examples: Examples, head: Head, **context: Any
    ) -> list[Prediction]:
        """The likeliest tag of each word; None for words after the limit of tokens."""
        found = []
        for item, tags in zip(examples.items, self._tags(outputs, examples), strict=True):
            names = [head.labels[tags[i]] if i in tags else None for i in range(len(item.texts[0]))]
            expected = None
            if item.target is not None:
                expected = [head.labels[place_of(tag, head.labels) or 0] for tag in item.target]
            found.append(Prediction(item.source, names, expected, {"tokens": item.texts[0]}))
        return found

    def _tags(self, outputs: Sequence[Tensor], examples: Examples) -> list[dict[int, int]]:
        """The likeliest tag of each word, by the number of the word."""
        return [
            {word: int(row.argmax()) for word, row in zip(features["words"], output, strict=False) if word >= 0}
            for features, output in zip(examples.features, outputs, strict=True)
        ]
