"""ORPO: supervised training on the chosen answers, and a penalty on the odds of the rejected ones (Hong et al. 2024,
arXiv 2403.07691). There is no reference model. As in TRL, the supervised loss counts the tokens of the prompt, too.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import disable_progress_bars, enable_progress_bars
from datasets.utils import is_progress_bar_enabled
from torch import Tensor

from reparam.adapter.context import tasks_of
from reparam.errors import ConfigError
from reparam.train.job import Job
from reparam.train.objectives.preferring import Preferring, beta_of
from reparam.train.objectives.with_trl import ARGUMENTS, Answers, FromTRL, numbers, row_numbers, without_dropout
from reparam.train.trainer import Resumable

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer


class ORPO(Preferring):
    """The objective orpo."""

    name = "orpo"
    compared = False

    def start(self, job: Job) -> str | None:
        """The base: no reference is used."""
        return None

    def trainer(self, job: Job, arguments: Mapping[str, Any], **others: Any) -> Resumable:
        """TRL's ORPOTrainer."""
        if tasks_of(job.model):
            raise ConfigError(
                "run.objective: TRL's ORPO passes no task to the model; use dpo, or a method without tasks"
            )
        without_dropout(job)
        given = ORPOConfig(
            **{**arguments, **ARGUMENTS, "max_length": job.config.data.max_length}, beta=beta_of(job.config)
        )
        shown = is_progress_bar_enabled()
        disable_progress_bars()
        try:
            return _ORPOTrainer(
                job.model,
                given,
                data_collator=_Batches(job),
                processing_class=job.tokenizer,
                **row_numbers(job, prompt="", chosen="", rejected=""),
                **others,
            )
        finally:
            if shown:
                enable_progress_bars()


class _Batches(Answers):
    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = self.batch(self.pairs(rows))
        chosen, rejected = (
            dict(zip(batch, parts, strict=True))
            for parts in zip(*(tensor.chunk(2) for tensor in batch.values()), strict=True)
        )
        found = {f"chosen_{key}": value for key, value in chosen.items()}
        found |= {f"rejected_{key}": value for key, value in rejected.items()}
        return {**found, "input_ids": batch["input_ids"], "row": numbers(rows)}  # transformers counts the input_ids


class _ORPOTrainer(FromTRL, Resumable, ORPOTrainer):
    """TRL's trainer with reparam's checkpoints."""

    def tokenize_row(self, feature: Any, model: Any = None) -> dict[str, Any]:
        return {}  # overridden because the rows are encoded

    def __init__(self, *args: Any, **others: Any) -> None:
        super().__init__(*args, **others)
        self.use_dpo_data_collator = True  # so that it does not warn of another collator


OBJECTIVE = ORPO()
