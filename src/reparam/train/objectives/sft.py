"""Supervised training: the loss of answers or texts, and exact matches of generated answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainingArguments

from reparam.data.batches import Collator, Encoded, padding_id
from reparam.data.encode import encode
from reparam.data.preferences import flat
from reparam.data.row import Row
from reparam.data.rows import read_rows
from reparam.evaluation.score import Answer, Score, answer, score_answers, score_loss
from reparam.train.config import Config
from reparam.train.job import Job
from reparam.train.objectives.objective import Objective
from reparam.train.trainer import Trainer


class SFT(Objective):
    """The objective sft. An item is a row."""

    name = "sft"

    def read(self, config: Config, source: str) -> list[Row]:
        """Read the rows of one answer or text each."""
        return read_rows(source, config.data.renamed())

    def rows(self, items: Sequence[Row]) -> list[Row]:
        """The items, which are rows."""
        return list(items)

    def encode(self, items: Sequence[Row], tokenizer: Any, **settings: Any) -> Encoded:
        """Encode the rows."""
        return encode(items, tokenizer, **settings)

    def trainer(self, job: Job, arguments: Mapping[str, Any], **others: Any) -> Trainer:
        """transformers' Trainer."""
        return Trainer(
            job.model,
            TrainingArguments(**arguments),
            train_dataset=flat(job.train),
            eval_dataset=flat(job.valid),
            data_collator=Collator(padding_id(job.tokenizer)),
            **others,
        )

    def score(self, job: Job) -> tuple[tuple[Score, ...], list[Answer]]:
        """The loss, and exact matches if the rows have answers in words."""
        scores = [score_loss(job.model, flat(job.valid), job.tokenizer, batch=job.config.run.batch_size)]
        answers = answer(job.model, job.tokenizer, job.held_out[: job.config.data.score_rows])
        if answers:
            scores.append(score_answers(answers))
        return tuple(scores), answers


OBJECTIVE = SFT()
