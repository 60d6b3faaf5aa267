"""What the objectives for preferences share: how they read, encode and score pairs."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from reparam.adapter.selection import select
from reparam.data.preferences import Preference, Preferences, encode_answers, read_pairs
from reparam.errors import ConfigError
from reparam.evaluation.preferences import log_probabilities, score_rewards
from reparam.evaluation.score import Answer, Score
from reparam.train.config import Config
from reparam.train.data import Data, held_out
from reparam.train.job import Job
from reparam.train.model import by_task
from reparam.train.objectives.objective import Objective
from reparam.train.objectives.reference import before_training

BETA = 0.1  # TRL's default for all of them


def beta_of(config: Config) -> float:
    """β, or its default."""
    return BETA if config.optim.beta is None else config.optim.beta


class Preferring(Objective):
    """An objective for preferences, which are pairs unless `read` says otherwise."""

    reads: ClassVar[tuple[str, ...]] = ("optim.beta",)
    compared = True
    """Whether rewards are relative to the model before training."""

    def check(self, config: Config) -> None:
        """Raise ConfigError for settings that the objective cannot use."""
        super().check(config)
        data = config.data
        if data.loss_on == "all":
            raise ConfigError(
                f"data.loss_on: {self.name} compares answers; leave it out, or set it to last for the last answer alone"
            )
        if data.too_long == "split":
            raise ConfigError(f"data.too_long: {self.name} compares whole answers; set it to error, drop or truncate")
        for key, default in (("weights", ()), ("max_rows", ()), ("bad_rows", "error")):
            if getattr(data, key) != default:
                raise ConfigError(f"data.{key}: not supported for preferences; leave it out")

    def read(self, config: Config, source: str) -> list[Preference]:
        """Read pairs of a chosen and a rejected answer."""
        return read_pairs(source, config.data.renamed())

    def ordered(self, found: list[Preference], seed: int) -> list[Preference]:
        """The preferences in the order in which they are encoded."""
        return found

    def data(self, config: Config, tokenizer: Any) -> Data:
        """Read and encode the preferences."""
        data, seed = config.data, config.run.seed
        train = [each for source in data.sources() for each in self.read(config, source)]
        if data.valid is None:
            kept, held = held_out(config, len(train))
            train, valid = [train[i] for i in kept], [train[i] for i in held]
        else:
            valid = [each for source in data.sources("valid") for each in self.read(config, source)]
        settings = {"max_length": data.max_length, "loss_on": data.loss_on, "too_long": data.too_long}
        with_tasks = config.method.known_tasks is not None
        corpora = [
            encode_answers(self.ordered(part, seed), tokenizer, with_tasks=with_tasks, **settings)
            for part in (train, valid)
        ]
        method, tasks = by_task(config.method, lambda: corpora[0].corpus.task_names())
        parts = [answers.preferences(tasks) for answers in corpora]
        return Data(parts[0], parts[1], [], method, tuple(answers.corpus for answers in corpora))

    def start(self, job: Job) -> str | None:
        """The model before training."""
        return before_training(job)

    def score(self, job: Job) -> tuple[tuple[Score, ...], list[Answer]]:
        """The margin and the accuracy of the rewards on the held-out preferences."""
        assert isinstance(job.valid, Preferences)
        return score_rewards(beta_of(job.config) * self._log_ratios(job, job.valid), job.valid), []

    def _log_ratios(self, job: Job, valid: Preferences) -> Tensor:
        """What rewards are β times of, [E] float64."""
        size = job.config.run.batch_size
        own, tokens = log_probabilities(job.model, valid, job.tokenizer, batch=size)
        if not self.compared:
            return own / tokens
        with select(job.model, before_training(job)):
            return own - log_probabilities(job.model, valid, job.tokenizer, batch=size)[0]
