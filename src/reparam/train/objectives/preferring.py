"""What the objectives for preferences share: how they read, encode and score pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from reparam.adapter.selection import select
from reparam.data.preferences import Preference, Preferences, encode_preferences, read_pairs
from reparam.data.row import Row
from reparam.errors import ConfigError
from reparam.evaluation.preferences import log_probabilities, score_rewards
from reparam.evaluation.score import Answer, Score
from reparam.train.config import Config
from reparam.train.job import Job
from reparam.train.objectives.objective import Objective
from reparam.train.objectives.reference import before_training

BETA = 0.1  # TRL's default for all of them


def beta_of(config: Config) -> float:
    """β, or its default."""
    return BETA if config.optim.beta is None else config.optim.beta


class Preferring(Objective):
    """An objective for preferences. An item is a pair."""

    reads: ClassVar[tuple[str, ...]] = ("optim.beta",)
    compared = True
    """Whether rewards are relative to the model before training."""

    def check(self, config: Config) -> None:
        """Raise ConfigError for settings that the objective cannot use."""
        super().check(config)
        if config.data.loss_on == "all":
            raise ConfigError(
                f"data.loss_on: {self.name} compares answers; leave it out, or set it to last for the last answer alone"
            )

    def read(self, config: Config, source: str) -> list[Preference]:
        """Read pairs of a chosen and a rejected answer."""
        return read_pairs(source, config.data.renamed())

    def rows(self, items: Sequence[Preference]) -> list[Row]:
        """All answers, each with its prompt."""
        return [row for item in items for row in item.answers]

    def encode(self, items: Sequence[Preference], tokenizer: Any, **settings: Any) -> Preferences:
        """Encode all answers."""
        return encode_preferences(items, tokenizer, **settings)

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
