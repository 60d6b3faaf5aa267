"""Supervised training: the loss of answers or texts, and exact matches of generated answers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainingArguments

from reparam.data.batches import Collator, Encoded, padding_id
from reparam.data.preferences import flat
from reparam.evaluation.score import Answer, Score, answer, score_answers, score_losses
from reparam.hf.packed import packed_collator
from reparam.train.config import Config
from reparam.train.data import Data, read_data
from reparam.train.evaluating import Evaluated
from reparam.train.job import Job
from reparam.train.losses import loss_of
from reparam.train.objectives.objective import Objective
from reparam.train.show import Show
from reparam.train.streaming import Streaming, check_streaming, read_stream
from reparam.train.trainer import Trainer


class SFT(Objective):
    """The objective sft."""

    name = "sft"
    metrics = ("loss", "exact_match")
    answers = True

    def unsupported(self, config: Config) -> dict[str, bool]:
        """None: all settings but those of preferences are for this objective."""
        return {}

    def data(self, config: Config, tokenizer: Any) -> Data:
        """Rows of one answer or text each."""
        check_streaming(config)
        return read_stream(config, tokenizer) if config.data.streaming else read_data(config, tokenizer)

    def loss(self, job: Job, show: Show) -> contextlib.AbstractContextManager[Any]:
        """The loss in chunks of logits, with smoothed labels."""
        return loss_of(job, show)

    def trainer(self, job: Job, arguments: Mapping[str, Any], **others: Any) -> Trainer:
        """transformers' Trainer."""
        made = Evaluated if job.stream is None else Streaming
        return made(
            job.model,
            TrainingArguments(**arguments),
            train_dataset=job.stream or job.packed or _rows(job, flat(job.train)),
            eval_dataset=_rows(job, flat(job.valid)),
            data_collator=_collate(job),
            **others,
        )

    def score(self, job: Job) -> tuple[tuple[Score, ...], list[Answer]]:
        """The loss, and exact matches if the rows have answers in words."""
        batch, data, seeing = job.config.run.batch_size, job.config.data, job.seeing
        scores = score_losses(job.model, flat(job.valid), job.tokenizer, batch=batch, seeing=seeing)
        rows = job.held_out[: data.score_rows]
        answers = answer(job.model, job.tokenizer, rows, longest=data.max_length, seeing=seeing)
        if answers:
            scores.append(score_answers(answers))
        return tuple(scores), answers


def _rows(job: Job, encoded: Encoded) -> Dataset[Any]:
    """The examples, for a vision-language model with their images."""
    return encoded if job.seeing is None else job.seeing.rows(encoded)


def _collate(job: Job) -> Callable[[list[dict[str, Tensor]]], dict[str, Any]]:
    """Batches of training rows or of packs of them, and of held-out rows, which are not packed."""
    if job.seeing is not None:
        return job.seeing.collate
    rows, packs = Collator(padding_id(job.tokenizer)), packed_collator(job.model, padding_id(job.tokenizer))
    return lambda examples: packs(examples) if "position_ids" in examples[0] else rows(examples)


OBJECTIVE = SFT()
