"""Supervised training for a task beyond causal language modeling. The tasks themselves are in `reparam.tasks`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, cast

import transformers
from torch import Tensor, nn
from transformers import TrainingArguments

from reparam.data.batches import padding_id
from reparam.data.examples import Examples
from reparam.data.tasks import task_names
from reparam.errors import ConfigError
from reparam.evaluation.score import Answer, Score
from reparam.hf.tasks import config_of_base, labels_of
from reparam.io.head import Head
from reparam.tasks import metrics
from reparam.tasks.scoring import score
from reparam.tasks.task import Task
from reparam.train.config import Config
from reparam.train.data import Data, read_parts
from reparam.train.evaluating import Measured
from reparam.train.job import Job
from reparam.train.model import by_task
from reparam.train.objectives.objective import Objective
from reparam.train.sections import RunConfig
from reparam.train.trainer import Resumable

OTHER = ("pooling", "temperature")  # settings of run that only the task embedding has


class ForTask(Objective):
    """The objective sft of a task."""

    name = "sft"
    reads: ClassVar[tuple[str, ...]] = ()

    def __init__(self, task: Task) -> None:
        self.task = task

    def check(self, config: Config) -> None:
        """Raise ConfigError for settings that the task does not use or cannot use, and without its libraries."""
        task, run = self.task.name, config.run
        if run.metric not in self.task.metrics:
            raise ConfigError(f"run.metric: the task {task} has no {run.metric}; one of {', '.join(self.task.metrics)}")
        if wrong := [key for key, changed in self.unsupported(config).items() if changed]:
            raise ConfigError(f"{wrong[0]}: the task {task} does not support it; leave it out")
        self.metrics = self.task.metrics  # type: ignore[misc]
        super().check(config)
        metrics.need(*self.task.libraries)

    def unsupported(self, config: Config) -> dict[str, bool]:
        """The keys of settings that the task does not support, and whether each is set."""
        data = config.data
        usual = RunConfig()
        own = {
            f"run.{key}": self.task.name != "embedding" and getattr(config.run, key) != getattr(usual, key)
            for key in OTHER
        }
        chats = {f"data.{key}": getattr(data, key) is not None for key in ("chat_template", "system", "thinking")}
        return (
            super().unsupported(config)
            | own
            | chats
            | {
                "run.group_by_length": False,
                "data.too_long": data.too_long == "split",
                "data.loss_on": data.loss_on != "answers",
            }
        )

    def data(self, config: Config, tokenizer: Any) -> Data:
        """Read and encode the rows, and tell from them what the model must be for."""
        data, run = config.data, config.run
        base = config_of_base(config.base.path, revision=config.base.revision)
        train, valid = read_parts(config, lambda source: self.task.read(source, data.renamed()))
        settings = {"max_length": longest(data.max_length, tokenizer, base), "seed": run.seed, "pooling": run.pooling}
        head = self.task.head(train, labels_of(base), **settings)
        method, tasks = by_task(config.method, lambda: task_names(cast(Any, train)))
        encoded, others = (
            self.task.encode(part, tokenizer, head, too_long=data.too_long, tasks=tasks) for part in (train, valid)
        )
        return Data(encoded, others, [], method, (encoded, others), None, head=head)

    def trainer(self, job: Job, arguments: Mapping[str, Any], **others: Any) -> Resumable:
        """transformers' Trainer with the loss of the task."""
        made = ForTaskTrainer(
            job.model,
            TrainingArguments(**arguments),
            train_dataset=cast(Any, job.train),
            eval_dataset=job.valid,
            data_collator=functools.partial(_collate, self.task, padding_id(job.tokenizer)),
            **others,
        )
        made.task, made.head, made.temperature = self.task, _head(job), job.config.run.temperature
        # The losses below are means over the targets of all micro-batches of a step, whatever the model's class takes.
        made.model_accepts_loss_kwargs, made._loss_shifts_labels = True, False
        return made

    def outputs(self, job: Job) -> Iterator[tuple[Mapping[str, Tensor], Callable[[], Tensor]]]:
        """Up to four held-out rows as batches, each with a function that computes its outputs."""
        assert isinstance(job.valid, Examples)
        device = next(job.model.parameters()).device
        for index in range(min(4, len(job.valid))):
            batch = self.task.batch([job.valid[index]], padding_id(job.tokenizer))
            inputs = {key: value.to(device) for key, value in batch.items() if key not in ("row", "task")}
            yield batch, functools.partial(self.task.forward, job.model, inputs, _head(job))

    def score(self, job: Job) -> tuple[tuple[Score, ...], list[Answer]]:
        """The loss and the scores of the task on the held-out rows."""
        assert isinstance(job.valid, Examples)
        run, data = job.config.run, job.config.data
        return score(
            *(self.task, job.model, job.tokenizer, job.valid, _head(job)),
            batch=run.batch_size,
            temperature=run.temperature,
            answers=data.score_rows,
        ), []


class TaskLoss(transformers.Trainer):
    """transformers' Trainer with the loss of a task."""

    task: Task
    head: Head
    temperature: float

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean loss over the targets, in training over those of all micro-batches of a step."""
        outputs = self.task.forward(model, inputs, self.head)
        losses = self.task.losses(outputs, inputs["labels"], self.temperature)
        loss = losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss


class ForTaskTrainer(Measured, Resumable, TaskLoss):
    """With reparam's checkpoints."""

    filled = False  # rows without loss have no label


def longest(wanted: int, tokenizer: Any, config: Any) -> int:
    """The number of tokens that texts are cut to: the wanted one, or what the tokenizer and the model take if less."""
    places = getattr(config, "max_position_embeddings", None)
    if places is not None and config.model_type in OFFSET:
        places -= (config.pad_token_id or 0) + 1
    return min(wanted, tokenizer.model_max_length, *([places] if places else []))


OFFSET = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "mpnet", "data2vec-text", "esm")
"""Models whose positions begin after that of the pad token."""


def _head(job: Job) -> Head:
    assert job.adapter.head is not None
    return job.adapter.head


def _collate(task: Task, pad: int, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    return task.batch(examples, pad)
