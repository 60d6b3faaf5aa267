"""What an objective is: how it reads rows, what it trains, and how it scores held-out rows."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from reparam.data.batches import Collator, padding_id
from reparam.data.preferences import flat
from reparam.errors import ConfigError
from reparam.evaluation.score import Answer, Score
from reparam.train.config import Config
from reparam.train.data import Data
from reparam.train.job import Job
from reparam.train.sections import PreferConfig
from reparam.train.show import Show
from reparam.train.trainer import Resumable


class Objective(abc.ABC):
    """One value of `run.objective`."""

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ()
    """The keys of the configuration for preferences that change something."""
    metrics: ClassVar[tuple[str, ...]] = ("loss",)
    """The values of `run.metric`."""
    answers: ClassVar[bool] = False
    """Whether held-out rows are answered during training, as by `run.metric` exact_match and `run.samples`."""

    def check(self, config: Config) -> None:
        """Raise ConfigError for settings that the objective does not use or cannot use."""
        if config.run.metric not in self.metrics:
            raise ConfigError(
                f"run.metric: the objective {self.name} has no {config.run.metric}; one of {', '.join(self.metrics)}"
            )
        if wrong := [key for key, changed in self.unsupported(config).items() if changed]:
            raise ConfigError(f"{wrong[0]}: the objective {self.name} does not support it; leave it out")
        given = {
            f"prefer.{f.name}": getattr(config.prefer, f.name) != f.default for f in dataclasses.fields(PreferConfig)
        }
        given["optim.beta"] = config.optim.beta is not None
        if idle := [key for key, changed in given.items() if changed and key not in self.reads]:
            raise ConfigError(
                f"{idle[0]}: the objective {self.name} does not use it; leave it out, or choose another run.objective"
            )

    def unsupported(self, config: Config) -> dict[str, bool]:
        """The keys of settings that the objective does not support, and whether each is set."""
        data, run = config.data, config.run
        return {
            "run.samples": run.samples > 0,
            "run.group_by_length": run.group_by_length,
            "data.weights": bool(data.weights),
            "data.max_rows": bool(data.max_rows),
            "data.packing": data.packing,
            "data.streaming": data.streaming,
            "data.bad_rows": data.bad_rows != "error",
            "optim.label_smoothing": config.optim.label_smoothing > 0,
        }

    @abc.abstractmethod
    def data(self, config: Config, tokenizer: Any) -> Data:
        """Read and encode all rows. Raises DataError for rows, and ConfigError for settings, that cannot be used."""

    def loss(self, job: Job, show: Show) -> contextlib.AbstractContextManager[Any]:
        """A context for training, in which the model computes its loss as configured."""
        return contextlib.nullcontext()

    @abc.abstractmethod
    def trainer(self, job: Job, arguments: Mapping[str, Any], **others: Any) -> Resumable:
        """The trainer. `arguments` are those of transformers' TrainingArguments, `others` those of the trainer."""

    def start(self, job: Job) -> str | None:
        """The name of the adapter to which the trained one is compared; None for the base alone."""
        return None

    def outputs(self, job: Job) -> Iterator[tuple[Mapping[str, Tensor], Callable[[], Tensor]]]:
        """Up to four held-out rows as batches, each with a function that computes its outputs by the selected adapter.

        They prove that the saved adapter is the trained one. One by one, because the logits of a long row are large.
        """
        collate: Any = Collator(padding_id(job.tokenizer)) if job.seeing is None else job.seeing.collate
        valid: Any = flat(job.valid) if job.seeing is None else job.seeing.rows(flat(job.valid))
        device = next(job.model.parameters()).device
        for index in range(min(4, len(valid))):
            batch = collate([valid[index]])
            inputs = {key: value.to(device) for key, value in batch.items() if key not in ("labels", "row", "task")}
            yield batch, functools.partial(_logits, job.model, inputs)

    @abc.abstractmethod
    def score(self, job: Job) -> tuple[tuple[Score, ...], list[Answer]]:
        """Score the model with the selected adapter on the held-out rows. Returns scores and any answers."""


def _logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    found: Tensor = model(**inputs).logits
    return found
