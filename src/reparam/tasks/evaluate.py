"""Score and use models for tasks: what `reparam eval` and `reparam generate` do with them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from reparam.adapter.adapter import Adapter
from reparam.adapter.context import tasks_of
from reparam.adapter.selection import select
from reparam.core.text import counted
from reparam.data.examples import Examples, Item
from reparam.errors import ConfigError
from reparam.evaluation.evaluate import Evaluation
from reparam.hf.models import vocabulary
from reparam.hf.open import open_model
from reparam.hf.tasks import CLASSIFYING, own_head
from reparam.io import files
from reparam.io.files import adapter_folder
from reparam.io.head import Head
from reparam.io.staged import write_file
from reparam.tasks import find_task, metrics
from reparam.tasks.scoring import score
from reparam.tasks.task import Prediction, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model for a task, with its adapter."""

    task: Task
    head: Head
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    adapter: Adapter | None

    def encode(self, items: Sequence[Item], *, too_long: str = "auto") -> Examples:
        """Encode rows as in training. Raises DataError for rows that the model cannot read."""
        tasks = tasks_of(self.model)
        found = self.task.encode(items, self.tokenizer, self.head, too_long=too_long, tasks=tasks)
        found.check_vocabulary(vocabulary(self.model), self.tokenizer)
        return found

    def predict(self, examples: Examples, *, batch: int, new_tokens: int | None = None) -> list[Prediction]:
        """What the model with the selected adapter says about each row, in at most `new_tokens` tokens."""
        found = self.task.outputs(self.model, examples, self.tokenizer, self.head, batch=batch)[0]
        context = {"model": self.model, "tokenizer": self.tokenizer, "batch": batch, "new_tokens": new_tokens}
        return self.task.predictions(found, examples, self.head, **context)


def is_for_task(base: str | None, adapter: str | Path | None, task: str | None = None) -> bool:
    """Whether the adapter, or else the base or the wish `task`, is for another task than causal language modeling."""
    if adapter is not None:
        return files.has_head(adapter_folder(adapter))
    return task not in (None, "causal") or (base is not None and own_head(base) is not None)


def opened(
    base: str | None,
    adapter: str | Path | None,
    *,
    task: str | None = None,
    dtype: str = "auto",
    storage: str | None = None,
    max_length: int | None = None,
) -> Opened:
    """Load the model for its task, which the adapter's files name, or else `task` or the base's architecture.

    Raises ConfigError if `task` is another one than that of the files or a library that it needs is not installed, and
    the errors of `reparam.hf.open.open_model`.
    """
    if adapter is not None:
        folder = adapter_folder(adapter)
        head = files.read(folder).head
    else:
        found = own_head(base) if base is not None else None
        head = found or (None if task is None else Head(find_task(task).name))  # type: ignore[arg-type]
    if head is None or (task is not None and task != head.task):
        named = "a causal language model" if head is None else f"for the task {head.task}"
        raise ConfigError(f"--task {task}: {adapter or base} is {named}; leave --task out")
    if adapter is None and head.task in CLASSIFYING and (found is None or found.task != head.task):
        raise ConfigError(f"{base}: has no head for {head.task}; train one, or give an adapter that has one")
    own = find_task(head.task)
    metrics.need(*own.libraries)
    model, tokenizer, placed = open_model(base, adapter, dtype=dtype, storage=storage, head=head)
    config: Any = model.config
    if head.task in CLASSIFYING and not head.labels and not head.regression:  # those in the files of the base
        head = dataclasses.replace(head, labels=tuple(str(config.id2label[i]) for i in range(config.num_labels)))
    if head.max_length is None or max_length is not None:
        limits = (max_length, tokenizer.model_max_length, head.max_length)
        head = dataclasses.replace(head, max_length=min(limit for limit in limits if limit is not None))
    return Opened(own, head, model, tokenizer, placed)


def evaluate(
    data: str | Path,
    base: str | None,
    adapter: str | None,
    *,
    task: str | None = None,
    dtype: str = "auto",
    storage: str | None = None,
    max_length: int | None = None,
    batch: int = 16,
    columns: Mapping[str, str] | None = None,
    predictions: Path | None = None,
) -> Evaluation:
    """Score the base and, if given, the adapter on the rows of `data`; write what the model says to `predictions`.

    `max_length` is in tokens (by default, that of training), `batch` in rows. `predictions` is a JSONL file. Raises
    ValueError if the data, the base or the adapter cannot be used.
    """
    found = opened(base, adapter, task=task, dtype=dtype, storage=storage, max_length=max_length)
    examples = found.encode(found.task.read(data, columns or {}))

    def scored(name: str | None) -> Any:
        if found.adapter is not None:
            select(found.model, name)
        return score(found.task, found.model, found.tokenizer, examples, found.head, batch=batch, answers=None)

    before = scored(None)
    after = scored(found.adapter.name) if found.adapter is not None else None
    if predictions is not None:
        write_predictions(found.predict(examples, batch=batch), predictions)
    return Evaluation(before, after, ())


def predict(
    text: str | None,
    rows: Path | None,
    base: str | None,
    adapter: str | None,
    *,
    dtype: str,
    storage: str | None,
    batch: int,
    columns: Mapping[str, str],
    output: Path | None,
    new_tokens: int,
) -> list[str]:
    """What the model says about a text, or about each row of a file, as lines to print; or written to `output`.

    Raises ValueError if there is neither, or if the rows, the base or the adapter cannot be used.
    """
    if text is None and rows is None:
        raise ConfigError("a text or --prompts is needed: only causal language models can chat")
    found = opened(base, adapter, dtype=dtype, storage=storage)
    if rows is not None:
        items = found.task.read(rows, columns, bare=True)
    else:
        key = {"token-classification": "tokens", "seq2seq": "input", "embedding": "anchor"}.get(found.task.name, "text")
        value: Any = text.split() if key == "tokens" else text  # type: ignore[union-attr]
        items = [found.task.item({key: value}, "the text", bare=True)]
    said = found.predict(found.encode(items), batch=batch, new_tokens=new_tokens)
    if output is not None:
        write_predictions(said, output)
        return [f"{counted(len(said), 'prediction')} in {output}"]
    if rows is not None:
        return _lines(said)
    return [_told(said[0])]


def _told(said: Prediction) -> str:
    """A prediction in words."""
    shares = said.details.get("probabilities")
    if shares:
        ranked = sorted(shares.items(), key=lambda pair: -pair[1])[:5]
        return ", ".join(f"{name} {share:.3f}" for name, share in ranked)
    if "tokens" in said.details:
        return " ".join(f"{word}/{tag}" for word, tag in zip(said.details["tokens"], said.given, strict=True))
    return said.given if isinstance(said.given, str) else json.dumps(said.given)


def write_predictions(found: Sequence[Prediction], file: Path) -> None:
    """Write one JSON object for each row, with its place, what was expected, and what the model says."""
    write_file(file, ("\n".join(_lines(found)) + "\n").encode())


def _lines(found: Sequence[Prediction]) -> list[str]:
    lines = []
    for each in found:
        told = {"source": each.source, "prediction": each.given, **each.details}
        if each.expected is not None:
            told["expected"] = each.expected
        lines.append(json.dumps(told, ensure_ascii=False))
    return lines
