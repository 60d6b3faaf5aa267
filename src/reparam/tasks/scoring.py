"""Score the selected adapter on the rows of a task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from reparam.data.examples import Examples
from reparam.evaluation.score import Score
from reparam.io.head import Head
from reparam.tasks import metrics
from reparam.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def score(
    task: Task,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    head: Head,
    *,
    batch: int,
    temperature: float = 0.05,
    **settings: Any,
) -> tuple[Score, ...]:
    """The mean loss of the targets, and the scores of the task. All rows must say what is expected of them.

    `batch` is the number of rows for each forward pass; `settings` are those of the task's scores.
    """
    outputs, losses = task.outputs(model, examples, tokenizer, head, batch=batch, temperature=temperature)
    loss = metrics.mean("loss", losses.tolist(), larger_is_better=False)
    return loss, *task.scores(outputs, examples, head, model=model, tokenizer=tokenizer, batch=batch, **settings)
