"""The output of a training run for machines: one JSON object on each line of standard output, and nothing else."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from rich.console import Console

from reparam.adapter.quantize import entries
from reparam.evaluation.terminal import say_line
from reparam.train.config import tables
from reparam.train.live import JsonLines
from reparam.train.show import Show

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import TrainerCallback, TrainerState

    from reparam.evaluation.score import Answer, Score
    from reparam.train.checkpoint import Found
    from reparam.train.config import Config
    from reparam.train.job import Job, Result
    from reparam.train.sections import RunConfig


class ShowJson(Show):
    """Prints a training run as lines of JSON, each with an `event`; docs/files.md lists the fields."""

    def __init__(self, console: Console) -> None:
        super().__init__(Console(quiet=True))
        self.lines = console

    def _say(self, event: str, **fields: Any) -> None:
        say_line(self.lines, {"event": event, **fields})

    def job(self, job: Job) -> None:
        """Print what will be trained and on how many rows."""
        trained = sum(p.numel() for p in job.adapter.parameters())
        self._say(
            "job",
            method=job.adapter.method.name,
            sites=len(job.adapter.sites),
            trained_parameters=trained,
            base_parameters=entries(job.model) - trained,
            training_rows=job.train.report.rows,
            held_out_rows=job.valid.report.rows,
            warnings=[*job.train.report.warnings, *job.valid.report.warnings],
        )

    def worse(self, before: Score, after: Score) -> None:
        """Print nothing: the result holds both scores."""

    def step(self, text: str) -> None:
        """Print the current step of the run."""
        self._say("stage", text=text)

    def note(self, text: str) -> None:
        """Print a note about how the run works."""
        self._say("note", text=text)

    def ended(self, early: str | None) -> None:
        """Print the method's note about a run that ended before the method's schedule did, if there is one."""
        if early is not None:
            self.note(early)

    def told(self, text: str, event: str, **fields: Any) -> None:
        """Print the event."""
        self._say(event, **fields)

    def samples(self, answers: Sequence[Answer]) -> None:
        """Print answers to held-out rows."""
        for given in answers:
            self._say("sample", **dataclasses.asdict(given), right=given.right)

    def best(self, state: TrainerState, *, run: RunConfig, early: bool) -> None:
        """Print the step whose weights the run ends with, and whether it stopped early."""
        if run.keeps_best and state.best_metric is not None:
            self._say("best", step=state.best_global_step, metric=run.metric, stopped_early=early)

    def found(self, found: Found, *, steps: int, before: int, schedule: str) -> None:
        """Print the checkpoint that the run resumes from, if there is one."""
        if found.path is not None or found.skipped:
            path = None if found.path is None else str(found.path)
            self._say("resume", checkpoint=path, skipped=[str(path) for path, _ in found.skipped])

    def plan(self, config: Config, steps: int, found: Found) -> None:
        """Print the resolved configuration and the number of steps of a run that `--dry-run` describes."""
        checkpoint = None if found.path is None else str(found.path)
        self._say("plan", steps=steps, checkpoint=checkpoint, configuration=tables(config))

    def callback(self, steps: int) -> TrainerCallback:
        """A callback that prints the progress of a Trainer over `steps` steps."""
        return JsonLines(self.lines, steps)

    def result(self, result: Result, difference: float) -> None:
        """Print the scores before and after training, and where the results are."""
        self._say(
            "result",
            folder=str(result.folder),
            adapter=str(result.folder / "adapter"),
            before=_scores(result.before),
            after=_scores(result.after),
            largest_change_of_a_logit=difference,
            answers=[_pair(*pair) for pair in result.answers],
        )


def _pair(without: Answer, given: Answer) -> dict[str, Any]:
    found = dataclasses.asdict(given)
    return {**found, "given_without_adapter": without.given, "right": given.right}


def _scores(scores: Sequence[Score]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(score) for score in scores]
