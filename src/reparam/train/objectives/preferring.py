"""What the objectives for preferences share: how they read, encode and score pairs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any, ClassVar

from torch import Tensor

from reparam.adapter.selection import select
from reparam.data.preferences import Preference, Preferences, encode_preferences, read_pairs
from reparam.data.tasks import task_names
from reparam.errors import ConfigError
from reparam.evaluation.preferences import log_probabilities, score_rewards
from reparam.evaluation.score import Answer, Score
from reparam.train.config import Config
from reparam.train.data import Data, read_parts
from reparam.train.job import Job
from reparam.train.model import by_task
from reparam.train.objectives.objective import Objective
from reparam.train.objectives.reference import before_training
from reparam.train.reading import check_chats, frame_of, prompt_format

BETA = 0.1  # TRL's default for all of them


def beta_of(config: Config) -> float:
    """β, or its default."""
    return BETA if config.optim.beta is None else config.optim.beta


class Preferring(Objective):
    """An objective for preferences."""

    reads: ClassVar[tuple[str, ...]] = ("optim.beta",)
    metrics: ClassVar[tuple[str, ...]] = ("loss", "reward_margin", "reward_accuracy")
    compared = True
    """Whether rewards are relative to the model before training."""

    def check(self, config: Config) -> None:
        """Raise ConfigError for settings that the objective cannot use."""
        super().check(config)
        if config.data.loss_on == "all":
            raise ConfigError(
                f"data.loss_on: {self.name} compares answers; leave it out, or set it to last for the last answer alone"
            )

    def unsupported(self, config: Config) -> dict[str, bool]:
        """The keys of settings that the objective does not support, and whether each is set."""
        return super().unsupported(config) | {"data.too_long": config.data.too_long in ("drop", "split")}

    def read(self, config: Config, source: str) -> list[Preference]:
        """Read pairs of a chosen and a rejected answer. Raises DataError for rows of another form."""
        return read_pairs(source, config.data.renamed())

    def ordered(self, items: list[Preference], seed: int) -> list[Preference]:
        """The items in the order in which they are encoded."""
        return items

    def data(self, config: Config, tokenizer: Any) -> Data:
        """Preferences, and those that are held out."""
        data, seed = config.data, config.run.seed
        parts = read_parts(config, lambda source: self.read(config, source))
        train, valid = (self.ordered(part, seed) for part in parts)
        framed = frame_of(data, tokenizer)
        kept = train if data.valid is not None else [*train, *valid]
        kinds: Counter[str] = Counter(row.kind for item in kept for row in item.answers)
        check_chats(data, kinds)
        train, valid = (
            [dataclasses.replace(item, answers=tuple(framed.rows(item.answers))) for item in part]
            for part in (train, valid)
        )
        method, tasks = by_task(config.method, lambda: task_names([row for item in train for row in item.answers]))
        encoded, others = (
            encode_preferences(
                part,
                tokenizer,
                max_length=data.max_length,
                loss_on=data.loss_on,
                too_long=data.too_long,
                tasks=tasks,
            )
            for part in (train, valid)
        )
        return Data(encoded, others, [], method, (encoded, others), prompt_format(data, tokenizer, kinds))

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
