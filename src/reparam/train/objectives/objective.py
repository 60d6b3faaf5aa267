"""What an objective is: how it reads rows, what it trains, and how it scores held-out rows."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from reparam.data.batches import Encoded
from reparam.data.preferences import Preferences
from reparam.data.row import Row
from reparam.errors import ConfigError
from reparam.evaluation.score import Answer, Score
from reparam.train.config import Config
from reparam.train.job import Job
from reparam.train.sections import PreferConfig
from reparam.train.trainer import Resumable


class Objective(abc.ABC):
    """One value of `run.objective`. An item is what counts as one example: a row, or a preference."""

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ()
    """The keys of the configuration for preferences that change something."""

    def check(self, config: Config) -> None:
        """Raise ConfigError for settings that the objective does not use or cannot use."""
        given = {
            f"prefer.{f.name}": getattr(config.prefer, f.name) != f.default for f in dataclasses.fields(PreferConfig)
        }
        given["optim.beta"] = config.optim.beta is not None
        if idle := [key for key, changed in given.items() if changed and key not in self.reads]:
            raise ConfigError(
                f"{idle[0]}: the objective {self.name} does not use it; leave it out, or choose another run.objective"
            )

    @abc.abstractmethod
    def read(self, config: Config, source: str) -> list[Any]:
        """The items of a source of rows. Raises DataError for rows of another form."""

    def ordered(self, items: list[Any], seed: int) -> list[Any]:
        """The items in the order in which they are encoded."""
        return items

    @abc.abstractmethod
    def rows(self, items: Sequence[Any]) -> list[Row]:
        """The rows in the items."""

    @abc.abstractmethod
    def encode(self, items: Sequence[Any], tokenizer: Any, **settings: Any) -> Encoded | Preferences:
        """Encode items. `settings` are those of `reparam.data.encode.encode`."""

    @abc.abstractmethod
    def trainer(self, job: Job, arguments: Mapping[str, Any], **others: Any) -> Resumable:
        """The trainer. `arguments` are those of transformers' TrainingArguments, `others` those of the trainer."""

    def start(self, job: Job) -> str | None:
        """The name of the adapter to which the trained one is compared; None for the base alone."""
        return None

    @abc.abstractmethod
    def score(self, job: Job) -> tuple[tuple[Score, ...], list[Answer]]:
        """Score the model with the selected adapter on the held-out rows. Returns scores and any answers."""
