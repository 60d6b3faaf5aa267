"""Evaluations during training: answers to held-out rows, the best weights, and when to stop early."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback, TrainerCallback

from reparam.errors import ConfigError
from reparam.evaluation.score import Answer, answer, answerable
from reparam.train import processes
from reparam.train.trainer import Trainer

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import EvalLoopOutput

    from reparam.train.job import Job
    from reparam.train.show import Show

RANK = "exact_match_then_loss"
"""The metric by which evaluations with exact matches are compared."""


class Evaluated(Trainer):
    """A Trainer whose evaluations also measure what an `Answering` does."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in transformers, with what `Answering` measures."""
        output = super().evaluation_loop(*args, **kwargs)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, Answering):
                measured = processes.first(callback.measure)
                output = output._replace(metrics={**(output.metrics or {}), **measured})
        return output


def evaluating(job: Job, show: Show) -> list[TrainerCallback]:
    """The callbacks that the configured evaluations need, in their order.

    Raises ConfigError if answers are to be counted and no held-out row has one.
    """
    run = job.config.run
    found: list[TrainerCallback] = []
    if run.metric == "exact_match" or run.samples:
        found.append(Answering(job, show))
    if run.patience:
        found.append(EarlyStoppingCallback(run.patience))
    return found


class Answering(TrainerCallback):
    """Answers the first held-out rows at each evaluation: counts the right answers, prints some, and stores these.

    They are stored in the entry of the evaluation in the log, which belongs to each checkpoint. Of evaluations with the
    same number of right answers, the one with the lower loss counts as better.
    """

    def __init__(self, job: Job, show: Show) -> None:
        run = job.config.run
        self.job, self.show, self.samples = job, show, run.samples
        self.counts = run.metric == "exact_match"
        rows = answerable(job.held_out)
        self.rows = rows[: max(run.samples, run.eval_rows if self.counts else 0)]
        self.counted = run.eval_rows
        self.longest = job.config.data.max_length
        self.answers: list[Answer] = []
        if not rows:
            key = "run.metric: exact_match" if self.counts else f"run.samples: {run.samples}"
            raise ConfigError(f"{key}: no held-out row is a question with an answer; leave it out, or set data.valid")

    def measure(self) -> dict[str, float]:
        """Answer the rows. Returns the share of right answers, from 0 to 1, if it is the metric."""
        self.answers = answer(self.job.model, self.job.tokenizer, self.rows, longest=self.longest)
        right = [given.right for given in self.answers[: self.counted]]
        return {"eval_exact_match": sum(right) / len(right)} if self.counts else {}

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Print the samples, store them in the log, and add the metric by which evaluations are compared."""
        metrics: dict[str, float] = kwargs["metrics"]
        if self.counts:
            step = 1 / min(len(self.rows), self.counted)  # between two shares of right answers
            metrics[f"eval_{RANK}"] = metrics["eval_exact_match"] + step / (2 + max(0.0, metrics["eval_loss"]))
        shown = self.answers[: self.samples]
        self.show.samples(shown)
        if shown:
            entry: dict[str, Any] = state.log_history[-1]
            entry["samples"] = [dataclasses.asdict(given) for given in shown]
