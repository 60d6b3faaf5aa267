"""DPO: raise the log-probability of chosen answers against rejected ones (Rafailov et al. 2023, arXiv 2305.18290)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from trl import DPOConfig, DPOTrainer

from reparam.errors import ConfigError
from reparam.train.config import Config
from reparam.train.job import Job
from reparam.train.objectives.preferring import Preferring, beta_of
from reparam.train.objectives.with_trl import (
    ARGUMENTS,
    Answers,
    FromTRL,
    compared_with_start,
    numbers,
)
from reparam.train.trainer import Resumable

SMOOTHED = ("robust", "exo_pair")


class DPO(Preferring):
    """The objective dpo."""

    name = "dpo"
    reads = ("optim.beta", "prefer.loss_type", "prefer.label_smoothing")

    def check(self, config: Config) -> None:
        """Raise ConfigError for settings that the objective cannot use."""
        super().check(config)
        loss, smoothing = config.prefer.loss_type, config.prefer.label_smoothing
        if smoothing and loss not in SMOOTHED:
            raise ConfigError(
                f"prefer.label_smoothing: the loss {loss} does not use it; set prefer.loss_type to {SMOOTHED[0]}, or "
                f"leave it out"
            )
        if loss == "exo_pair" and not smoothing:
            raise ConfigError("prefer.label_smoothing: the loss exo_pair needs a value above 0, such as 0.001")

    def trainer(self, job: Job, arguments: Mapping[str, Any], **others: Any) -> Resumable:
        """TRL's DPOTrainer."""
        prefer = job.config.prefer
        given = DPOConfig(
            **{**arguments, **ARGUMENTS},
            beta=beta_of(job.config),
            loss_type=[prefer.loss_type],
            label_smoothing=prefer.label_smoothing,
        )
        return compared_with_start(_DPOTrainer, job, self.start(job), given, _Batches(job), **others)


class _Batches(Answers):
    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return {**self.compared(self.pairs(rows)), "row": numbers(rows)}


class _DPOTrainer(FromTRL, Resumable, DPOTrainer):
    """TRL's trainer with reparam's checkpoints."""


OBJECTIVE = DPO()
