"""Scores on held-out rows: exact match, bits per byte and loss per token, each with a 95 % confidence interval."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reparam.adapter.context import tasks_of, told
from reparam.core.progress import tracked
from reparam.core.text import counted
from reparam.data.batches import Collator, Encoded, padding_id
from reparam.data.chat import ChatTemplate
from reparam.data.messages import Messages
from reparam.data.row import Row
from reparam.data.tasks import task_numbers
from reparam.errors import DataError
from reparam.evaluation.complete import complete
from reparam.hf.chunked import RowLosses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Score:
    """A score with its 95 % confidence interval over held-out rows."""

    name: str
    value: float
    """A share in 0 ... 1 for exact match, nats for loss per token, bits for bits per byte."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    rows: int
    """Number of scored rows; for the two losses, of examples (a long text row is split into several)."""
    larger_is_better: bool

    def worse_than(self, other: Score) -> bool:
        """Whether this score is worse than the same score of another model, or is no number."""
        return not (self.value >= other.value if self.larger_is_better else self.value <= other.value)

    def __str__(self) -> str:
        interval = f"95 % interval {self.low:.3f} to {self.high:.3f}"
        return f"{self.name} {self.value:.3f} ({interval}, {counted(self.rows, 'row')})"


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer of a model to a held-out row."""

    source: str
    question: str
    expected: str
    given: str

    @property
    def right(self) -> bool:
        """Whether the answer equals the expected one, ignoring leading and trailing white space."""
        return self.expected.strip() == self.given.strip()


def score_loss(model: nn.Module, encoded: Encoded, tokenizer: PreTrainedTokenizerBase, *, batch: int = 8) -> Score:
    """Bits per byte for text rows; otherwise the mean loss, in nats, per token that carries loss.

    The score is a ratio of two sums over examples. Its 95 % interval is ±1.96 standard errors, estimated from the
    residuals of the examples. `batch` is the number of examples per forward pass. Raises ValueError if no token of the
    examples carries loss.
    """
    nats, tokens = token_losses(model, encoded, tokenizer, batch=batch)
    texts = bool(encoded.text_bytes.sum())
    weights = encoded.text_bytes.double() if texts else tokens
    if not weights.sum() > 0:
        raise ValueError(
            f"no token of the {counted(len(encoded), 'example')} carries loss, so there is no loss to score; give rows "
            f"with an answer or a text"
        )
    if texts:
        return loss_score("bits per byte", nats, weights, unit=math.log(2))
    return loss_score("loss per token", nats, weights)


def loss_score(name: str, nats: Tensor, weights: Tensor, *, unit: float = 1.0) -> Score:
    """A ratio of two sums over examples, [E] float64 each, in units of so many nats, with its 95 % interval."""
    ratio = float(nats.sum() / weights.sum())
    spread = float((nats - ratio * weights).std()) * math.sqrt(len(nats)) / float(weights.sum()) if len(nats) > 1 else 0
    value, half = ratio / unit, 1.96 * spread / unit
    return Score(name, value, value - half, value + half, len(nats), larger_is_better=False)


@torch.no_grad()
def token_losses(
    model: nn.Module, encoded: Encoded, tokenizer: PreTrainedTokenizerBase, *, batch: int
) -> tuple[Tensor, Tensor]:
    """The summed cross entropy in nats and the number of loss tokens of each example, both [E] float64."""
    collate = Collator(padding_id(tokenizer))
    device = next(model.parameters()).device
    nats, tokens = torch.zeros(len(encoded), dtype=torch.float64), torch.zeros(len(encoded), dtype=torch.float64)
    by_length = torch.argsort(encoded.lengths).tolist()
    training = model.training
    model.eval()
    row_losses = RowLosses(model)
    for start in tracked(range(0, len(by_length), batch), "scoring held-out rows", unit="batches"):
        examples = collate([encoded[i] for i in by_length[start : start + batch]])
        rows = examples["row"]
        inputs = {key: examples[key].to(device) for key in ("input_ids", "attention_mask", "labels")}
        with told(model, examples):
            nats[rows] = row_losses(inputs).double().cpu()
        tokens[rows] = (examples["labels"][:, 1:] != -100).sum(1).double()
    model.train(training)
    return nats, tokens


def score_answers(answers: Sequence[Answer]) -> Score:
    """The share of exact matches (0 ... 1) with its Wilson score interval. Raises ValueError if there are none."""
    if not answers:
        raise ValueError("there are no answers to score; give rows with a completion, or chats that end with an answer")
    return share("exact match", sum(answer.right for answer in answers), len(answers))


def share(name: str, right: float, n: int) -> Score:
    """The share of `n` rows that are right (0 ... 1) with its Wilson score interval. Larger is better."""
    p, z = right / n, 1.96
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Score(name, p, max(0.0, center - half), min(1.0, center + half), n, larger_is_better=True)


def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    batch: int = 32,
    max_new_tokens: int | None = None,
    longest: int | None = None,
    through: Callable[[Sequence[list[int]], int], list[str]] | None = None,
) -> list[Answer]:
    """Generate greedy answers to completions and to the last turn of chats.

    Rows without an expected answer (texts, and chats that do not end with one) are left out. `batch` is the number of
    prompts per call of `generate`. By default, `max_new_tokens` is the length of the longest expected answer plus 8, or
    `longest` if that is less: a longer answer counts as wrong, and takes no more time. `through` gives the texts of
    prompts and a number of new tokens; by default, `complete` does.
    Raises DataError if the selected adapter depends on the task and a row has no known task, and for a prompt without
    tokens.
    """
    asked = answerable(rows)
    pairs = [pair for pair in map(_split, asked) if pair is not None]
    template = ChatTemplate(tokenizer) if any(row.kind == "chat" for row in asked) else None
    prompts = [
        _prompt(tokenizer, template, question, row.variables) for row, (question, _) in zip(asked, pairs, strict=True)
    ]
    empty = [row.source for row, prompt in zip(asked, prompts, strict=True) if not prompt]
    if empty:
        raise DataError([f"{source}: the prompt is empty, so no answer can be generated" for source in empty])
    expected = [answer for _, answer in pairs]
    names = tasks_of(model)
    tasks = task_numbers(asked, names) if names else None
    if max_new_tokens is None:
        max_new_tokens = max((len(tokenizer(text)["input_ids"]) for text in expected), default=0) + 8
        max_new_tokens = max_new_tokens if longest is None else min(max_new_tokens, longest)
    if through is None:
        given = complete(model, tokenizer, prompts, batch=batch, max_new_tokens=max_new_tokens, tasks=tasks)
    else:
        given = through(prompts, max_new_tokens)
    return [
        Answer(row.source, question if isinstance(question, str) else str(question[-1]["content"]), want, got)
        for row, (question, want), got in zip(asked, pairs, given, strict=True)
    ]


def answerable(rows: Sequence[Row]) -> list[Row]:
    """The rows with an expected answer: completions, and chats that end with an answer in words."""
    return [row for row in rows if row.kind != "text" and _split(row) is not None]


def _split(row: Row) -> tuple[str | Messages, str] | None:
    """The question and the expected answer of a row, or None for a chat that does not end with an answer in words."""
    if row.kind == "completion":
        return row.prompt, row.completion
    *before, last = row.messages
    if last["role"] != "assistant" or last.get("tool_calls") or not before:
        return None
    return before, last["content"]


def _prompt(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate | None,
    question: str | Messages,
    variables: Mapping[str, Any],
) -> list[int]:
    if isinstance(question, str):
        return list(tokenizer(question)["input_ids"])
    assert template is not None
    return list(tokenizer(template.prompt(question, variables), add_special_tokens=False)["input_ids"])
