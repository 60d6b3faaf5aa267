"""KTO: raise good answers and lower bad ones, without pairs (Ethayarajh et al. 2024, arXiv 2402.01306).

As in TRL, the order of the rows is fixed: each answer is also scored after the prompt of its neighbor in the batch,
which estimates how far the model has moved from its start. So the rows are shuffled once, by the seed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from trl import KTOConfig, KTOTrainer

from reparam.data.batches import IGNORED
from reparam.data.preferences import Preference, read_answers
from reparam.errors import ConfigError, DataError
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


class KTO(Preferring):
    """The objective kto. An item is a single answer."""

    name = "kto"
    reads = ("optim.beta", "prefer.desirable_weight", "prefer.undesirable_weight")

    def check(self, config: Config) -> None:
        """Raise ConfigError for settings that the objective cannot use."""
        super().check(config)
        if config.run.batch_size < 2:
            raise ConfigError("run.batch_size: kto compares the rows of a batch, so it needs at least 2")
        if not config.prefer.desirable_weight + config.prefer.undesirable_weight:
            raise ConfigError("prefer.desirable_weight and prefer.undesirable_weight: one of them must be above 0")

    def read(self, config: Config, source: str) -> list[Preference]:
        """Read answers with a label; a pair is a good and a bad answer."""
        found = read_answers(source, config.data.renamed())
        if len({item.good for item in found}) == 1:
            kind = "good" if found[0].good else "bad"
            raise DataError([f"{source}: all {len(found):,} answers are {kind}; kto needs both good and bad ones"])
        return found

    def ordered(self, items: list[Preference], seed: int) -> list[Preference]:
        """The items in a random order, which stays the same in all epochs."""
        return random.Random(seed).sample(items, len(items))

    def trainer(self, job: Job, arguments: Mapping[str, Any], **others: Any) -> Resumable:
        """TRL's KTOTrainer."""
        prefer = job.config.prefer
        given = KTOConfig(
            **{**arguments, **ARGUMENTS, "train_sampling_strategy": "sequential"},
            beta=beta_of(job.config),
            desirable_weight=prefer.desirable_weight,
            undesirable_weight=prefer.undesirable_weight,
        )
        return compared_with_start(_KTOTrainer, job, self.start(job), given, _Batches(job), **others)


class _Batches(Answers):
    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._longest = job.config.data.max_length

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        examples = [self.examples(row["row"])[0] for row in rows]
        others = [_answer(example) for example in [self._before(rows, examples), *examples[:-1]]]
        pairs = zip(examples, others, strict=True)
        mixed = self.compared([self._joined(example, other) for example, other in pairs])
        kl = {f"KL_{key}": value for key, value in mixed.items() if key != "task"}
        label = torch.tensor([self.good(row["row"]) for row in rows])
        return {**self.compared(examples), **kl, "label": label, "row": numbers(rows)}

    def _before(self, rows: Sequence[Mapping[str, Any]], examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The row whose answer follows the first prompt: the last one, as in TRL; for a single row, another one."""
        if len(examples) > 1:
            return examples[-1]
        number, first = rows[0]["row"], len(self._train)
        return self.examples(number - 1 if number not in (0, first) else number + 1)[0]

    def _joined(self, example: dict[str, Tensor], answer: Tensor) -> dict[str, Tensor]:
        """The prompt of an example with another answer."""
        prompt = example["input_ids"][: _start(example)]
        ids = torch.cat([prompt, answer])[: self._longest]
        labels = torch.cat([torch.full_like(prompt, IGNORED), answer])[: self._longest]
        return {**example, "input_ids": ids, "labels": labels}


def _start(example: dict[str, Tensor]) -> int:
    return int((example["labels"] != IGNORED).nonzero()[0])


def _answer(example: dict[str, Tensor]) -> Tensor:
    return example["input_ids"][_start(example) :]


class _KTOTrainer(FromTRL, Resumable, KTOTrainer):
    """TRL's trainer with reparam's checkpoints."""


OBJECTIVE = KTO()
