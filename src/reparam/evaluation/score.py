"""Scores on held-out rows: exact match, bits per byte and loss per token, each with a 95 % confidence interval."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
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
from reparam.images.seeing import Seeing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOSS = "loss per token"


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
    return loss_score(LOSS, nats, weights)


def score_losses(
    model: nn.Module,
    encoded: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch: int = 8,
    seeing: Seeing | None = None,
) -> list[Score]:
    """What `score_loss` returns. If a vision-language model has rows with images and rows without, also that of each.

    `seeing` makes the inputs of such a model.
    """
    if seeing is None:
        return [score_loss(model, encoded, tokenizer, batch=batch)]
    nats, tokens = token_losses(model, encoded, tokenizer, batch=batch, seeing=seeing)
    found = [loss_score(LOSS, nats, tokens)]
    seen = torch.tensor([bool(seeing.sources(place)) for place in encoded.sources])
    if bool(seen.any()) and not bool(seen.all()):
        kinds = ((f"{LOSS} with images", seen), (f"{LOSS} of text alone", ~seen))
        found += [loss_score(name, nats[kind], tokens[kind]) for name, kind in kinds]
    return found


def loss_score(name: str, nats: Tensor, weights: Tensor, *, unit: float = 1.0) -> Score:
    """A ratio of two sums over examples, [E] float64 each, in units of so many nats, with its 95 % interval."""
    ratio = float(nats.sum() / weights.sum())
    spread = float((nats - ratio * weights).std()) * math.sqrt(len(nats)) / float(weights.sum()) if len(nats) > 1 else 0
    value, half = ratio / unit, 1.96 * spread / unit
    return Score(name, value, value - half, value + half, len(nats), larger_is_better=False)


@torch.no_grad()
def token_losses(
    model: nn.Module,
    encoded: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch: int,
    seeing: Seeing | None = None,
) -> tuple[Tensor, Tensor]:
    """The summed cross entropy in nats and the number of loss tokens of each example, both [E] float64."""
    collate: Any = Collator(padding_id(tokenizer)) if seeing is None else seeing.collate
    dataset: Any = encoded if seeing is None else seeing.rows(encoded)
    device = next(model.parameters()).device
    nats, tokens = torch.zeros(len(encoded), dtype=torch.float64), torch.zeros(len(encoded), dtype=torch.float64)
    by_length = torch.argsort(encoded.lengths).tolist()
    training = model.training
    model.eval()
    row_losses = RowLosses(model)
    for start in tracked(range(0, len(by_length), batch), "scoring held-out rows", unit="batches"):
        examples = collate([dataset[i] for i in by_length[start : start + batch]])
        rows = examples["row"]
        inputs = {key: value.to(device) for key, value in examples.items() if key not in ("row", "task")}
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
    seeing: Seeing | None = None,
) -> list[Answer]:
    """Generate greedy answers to completions and to the last turn of chats.

    Rows without an expected answer (texts, and chats that do not end with one) are left out. `batch` is the number of
    prompts per call of `generate`. By default, `max_new_tokens` is the length of the longest expected answer plus 8, or
    `longest` if that is less: a longer answer counts as wrong, and takes no more time. `through` gives the texts of
    prompts and a number of new tokens; by default, `complete` does. `seeing` makes the inputs of a vision-language
    model.
    Raises DataError if the selected adapter depends on the task and a row has no known task, and for a prompt without
    tokens.
    """
    asked = [row for row in answerable(rows) if seeing is None or row.kind == "chat" or row.prompt]
    pairs = [pair for pair in map(_split, asked) if pair is not None]
    chats = any(row.kind == "chat" for row in asked)
    template = ChatTemplate(tokenizer, images=seeing) if chats else None
    prompts = [
        _prompt(tokenizer, template, question, row, seeing) for row, (question, _) in zip(asked, pairs, strict=True)
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
        more = None if seeing is None else functools.partial(_with_images, seeing, [row.source for row in asked])
        given = complete(model, tokenizer, prompts, batch=batch, max_new_tokens=max_new_tokens, tasks=tasks, more=more)
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
    row: Row,
    seeing: Seeing | None,
) -> list[int]:
    raw = isinstance(question, str)
    if isinstance(question, str):
        text = question
    else:
        assert template is not None
        text = template.prompt(question, row.variables)
    if seeing is not None:
        return seeing.prompt_ids(seeing.sources(row.source), text, raw=raw)
    return list(tokenizer(text, **({} if raw else {"add_special_tokens": False}))["input_ids"])


def _with_images(seeing: Seeing, places: Sequence[str], chosen: Sequence[int], ids: Tensor) -> dict[str, Tensor]:
    return seeing.inputs(ids, [seeing.sources(places[i]) for i in chosen])
