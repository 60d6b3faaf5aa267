"""Evaluations during training: what they measure on held-out rows, the best weights, and when to stop early."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback, TrainerCallback

from reparam.errors import ConfigError
from reparam.evaluation.score import Answer, answer, answerable
from reparam.train import processes
from reparam.train.trainer import Resumable, Trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import EvalLoopOutput

    from reparam.data.row import Row
    from reparam.train.job import Job
    from reparam.train.objectives.objective import Objective
    from reparam.train.sections import RunConfig
    from reparam.train.show import Show

    _Trainer = Resumable
else:
    _Trainer = object

SHARES = ("exact_match", "reward_accuracy", "accuracy", "recall_at_1", "recall_at_5", "recall_at_10")
"""Metrics that are shares of rows, so that evaluations are often equal: the lower loss is then better."""


def rank(run: RunConfig) -> str:
    """The name of the value by which evaluations are compared."""
    return f"{run.metric}_then_loss" if run.metric in SHARES else run.metric


class Measured(_Trainer):
    """Makes the evaluations of a trainer measure what its `Measure` callbacks do. It is put before the trainer."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in transformers, with what the callbacks measure."""
        output = super().evaluation_loop(*args, **kwargs)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, Measure):
                # The first process measures, and all of them compare evaluations by it.
                measured, callback.rows_measured = processes.first(partial(_measured, callback))
                output = output._replace(metrics={**(output.metrics or {}), **measured})
        return output


def _measured(callback: Measure) -> tuple[dict[str, float], int]:
    return callback.measure(), callback.rows_measured


class Evaluated(Measured, Trainer):
    """A Trainer whose evaluations also measure what `Measure` callbacks do."""


def evaluating(job: Job, objective: Objective, show: Show) -> list[TrainerCallback]:
    """The callbacks that the configured evaluations need, in their order.

    Raises ConfigError if answers are to be counted and no held-out row has one.
    """
    run = job.config.run
    found: list[TrainerCallback] = []
    if objective.answers and (run.metric == "exact_match" or run.samples):
        found.append(Answering(job, show))
    elif run.metric != "loss":
        found.append(Scoring(job, objective))
    if run.patience:
        found.append(EarlyStoppingCallback(run.patience))
    return found


class Measure(TrainerCallback):
    """Measures `run.metric` at each evaluation."""

    def __init__(self, job: Job) -> None:
        self.job, self.rows_measured = job, 0

    def measure(self) -> dict[str, float]:
        """Measure the selected adapter. Returns the metric, if it is more than the loss."""
        raise NotImplementedError

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the value by which evaluations are compared, if the metric is a share of rows."""
        metrics: dict[str, float] = kwargs["metrics"]
        metric = self.job.config.run.metric
        if metric in SHARES:
            step = 1 / (2 * self.rows_measured)  # between two shares of rows, of which some may count half
            metrics[f"eval_{rank(self.job.config.run)}"] = metrics[f"eval_{metric}"] + step / (
                2 + max(0.0, metrics["eval_loss"])
            )


class Scoring(Measure):
    """Computes the scores of the objective at each evaluation, as before and after training."""

    def __init__(self, job: Job, objective: Objective) -> None:
        super().__init__(job)
        self.objective = objective

    def measure(self) -> dict[str, float]:
        """Compute the scores. Returns the metric."""
        metric = self.job.config.run.metric
        scores = {score.name.replace(" ", "_"): score for score in self.objective.score(self.job)[0]}
        if metric not in scores:  # there is no margin without both good and bad answers
            raise ConfigError(
                f"run.metric: the held-out rows have no {metric.replace('_', ' ')}; set run.metric to loss"
            )
        self.rows_measured = scores[metric].rows
        return {f"eval_{metric}": scores[metric].value}


class Answering(Measure):
    """Answers the first held-out rows at each evaluation: counts the right answers, prints some, and stores these.

    They are stored in the entry of the evaluation in the log, which belongs to each checkpoint.
    """

    def __init__(self, job: Job, show: Show, *, ask: Callable[[Sequence[Row]], list[Answer]] | None = None) -> None:
        """`ask` answers rows; by default, the model of the job does."""
        super().__init__(job)
        run = job.config.run
        self.show, self.samples = show, run.samples
        self.counts = run.metric == "exact_match"
        rows = answerable(job.held_out)
        if ask is not None:
            rows = [row for row in rows if row.kind == "chat" or row.prompt]
        self.ask = ask or self._ask
        self.rows = rows[: max(run.samples, run.eval_rows if self.counts else 0)]
        self.counted = run.eval_rows
        self.longest = job.config.data.max_length
        self.answers: list[Answer] = []
        if not rows:
            key = "run.metric: exact_match" if self.counts else f"run.samples: {run.samples}"
            raise ConfigError(f"{key}: no held-out row is a question with an answer; leave it out, or set data.valid")

    def measure(self) -> dict[str, float]:
        """Answer the rows. Returns the share of right answers, from 0 to 1, if it is the metric."""
        self.answers = self.ask(self.rows)
        right = [given.right for given in self.answers[: self.counted]]
        self.rows_measured = len(right)
        return {"eval_exact_match": sum(right) / len(right)} if self.counts else {}

    def _ask(self, rows: Sequence[Row]) -> list[Answer]:
        return answer(self.job.model, self.job.tokenizer, rows, longest=self.longest, seeing=self.job.seeing)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Print the samples, store them in the log, and add the value by which evaluations are compared."""
        super().on_evaluate(args, state, control, **kwargs)
        shown = self.answers[: self.samples]
        self.show.samples(shown)
        if shown:
            entry: dict[str, Any] = state.log_history[-1]
            entry["samples"] = [dataclasses.asdict(given) for given in shown]
