"""What the objectives that are TRL's trainers share: data, dropout, log-probabilities, metrics in checkpoints."""

from __future__ import annotations

import functools
import types
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput

from reparam.data.batches import IGNORED, Collator, padding_id
from reparam.data.preferences import Preferences
from reparam.train.evaluating import Measured
from reparam.train.job import Job
from reparam.train.objectives.reference import Reference
from reparam.train.trainer import Resumable

# TRL uses names that transformers has replaced.
warnings.filterwarnings("ignore", message=r"`(is_)?gradient_checkpointing(_enable|_disable)?` is deprecated")
OLDER = "_stored_metrics"  # where the experimental trainers keep their metrics
# Settings of TRL's arguments that are fixed: rows come encoded, and dropout is turned off by `without_dropout`.
ARGUMENTS = {"max_length": None, "disable_dropout": False, "gradient_checkpointing": False}


class FromTRL(Measured):
    """Put between `Resumable` and a trainer of TRL.

    TRL's trainers get encoded rows: their data sets hold the numbers of the rows, which the collator looks up.
    """

    filled = False  # accelerate takes rows from the beginning again

    def unlogged(self) -> dict[str, Any]:
        """The metrics since the last log entry, and the count of tokens."""
        kept = self._collected()
        metrics = {mode: {name: list(values) for name, values in of.items()} for mode, of in kept.items()}
        return {"metrics": metrics, "tokens": getattr(self, "_total_train_tokens", 0)}

    def log_later(self, values: Any) -> None:
        """Restore what `unlogged` returned."""
        kept = self._collected()
        for mode, metrics in values["metrics"].items():
            kept[mode] = defaultdict(list, metrics)
        self._total_train_tokens = values["tokens"]

    def _collected(self) -> dict[str, dict[str, list[float]]]:
        """The metrics since the last log entry, by mode (train or eval) and name."""
        found: dict[str, dict[str, list[float]]] = getattr(self, "_metrics" if hasattr(self, "_metrics") else OLDER)
        return found

    def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
        return dataset  # overridden because the rows are encoded

    def _send_telemetry(self) -> None:
        """Overridden because reparam tells nobody about a run."""


def row_numbers(job: Job, **columns: Any) -> dict[str, Dataset]:
    """The data sets for TRL: numbers of preferences, those held out after those to train on; and the given columns,
    with one value for all rows."""
    train, valid = len(job.train), len(job.valid)
    parts = {"train_dataset": range(train), "eval_dataset": range(train, train + valid)}
    return {
        part: Dataset.from_dict({"row": list(numbers), **{key: [one] * len(numbers) for key, one in columns.items()}})
        for part, numbers in parts.items()
    }


class Answers:
    """Makes padded batches of the encoded answers of a run. `numbers` are those of `row_numbers`."""

    def __init__(self, job: Job) -> None:
        assert isinstance(job.train, Preferences)
        assert isinstance(job.valid, Preferences)
        self._train, self._valid = job.train, job.valid
        self._collate = Collator(padding_id(job.tokenizer))

    def examples(self, number: int) -> list[dict[str, Tensor]]:
        """The answers of a preference: of a pair, the chosen one and the rejected one."""
        part, index = self._at(number)
        count = 2 if part.paired else 1
        return [part.encoded[index * count + i] for i in range(count)]

    def good(self, number: int) -> bool:
        """Whether a single answer is good."""
        part, index = self._at(number)
        return bool(part.good[index])

    def pairs(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Tensor]]:
        """All chosen answers of the rows, then all rejected ones."""
        pairs = [self.examples(row["row"]) for row in rows]
        return [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]

    def batch(self, examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels [B, T] of B answers; task [B] if there are tasks."""
        batch = self._collate(examples)
        del batch["row"]  # the numbers of the answers
        return batch

    def compared(self, examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """As `batch`, with the `completion_mask` [B, T] of the tokens that are compared in place of the labels."""
        batch = self.batch(examples)
        batch["completion_mask"] = (batch.pop("labels") != IGNORED).long()
        return batch

    def _at(self, number: int) -> tuple[Preferences, int]:
        first = len(self._train)
        return (self._train, number) if number < first else (self._valid, number - first)


def numbers(rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """The numbers of the rows of a batch, [B] int64; the trainer takes them out of the inputs."""
    return torch.tensor([row["row"] for row in rows])


def without_dropout(job: Job) -> None:
    """Turn off the dropout of the base, as TRL does: rewards compare log-probabilities. That of the adapter stays."""
    own = {id(part) for update in job.adapter.updates.values() for part in update.modules()}
    for module in job.model.modules():
        if isinstance(module, nn.Dropout) and id(module) not in own:
            module.p = 0.0


def compared_with_start(
    trainer: Callable[..., Resumable], job: Job, start: str | None, arguments: Any, batches: Answers, **others: Any
) -> Resumable:
    """A trainer of TRL that compares the model with itself before training; `start` is the adapter it had then."""
    without_dropout(job)
    install = score_any_head(job.model)
    made = trainer(
        job.model,
        arguments,
        ref_model=Reference(job.model, start),
        data_collator=batches,
        processing_class=job.tokenizer,
        **row_numbers(job),
        **others,
    )
    install()
    return made


def score_any_head(model: Any, *, temperature: float = 1.0) -> Callable[[], None]:
    """Let TRL's log-probabilities be computed for any output head. Call the result after TRL's trainer is made.

    TRL multiplies by the `weight` of the head without calling it. That is exact for a plain head, and saves memory. A
    head that is adapted or quantized is called, by the model's own forward.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    plain = type(inner.get_output_embeddings()) is nn.Linear
    original = inner.forward

    @functools.wraps(type(inner).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if fused_lm_head:
            return from_logits(original(*args, **kwargs), labels, temperature)
        return original(*args, **kwargs) if labels is None else original(*args, labels=labels, **kwargs)

    def install() -> None:
        if not plain:
            inner.forward = types.MethodType(forward, inner)

    return install


def from_logits(output: Any, labels: Tensor, temperature: float) -> FusedCausalLMOutput:
    """What TRL's head gives for the labels [B, T], from the logits [B, T, V] of the model's own output."""
    targets = labels[:, 1:]  # [B, T - 1]
    mask = targets != IGNORED
    logits = output.logits[:, :-1][mask].float() / temperature  # [N, V] of the N tokens that count
    logs = logits.log_softmax(-1)
    chosen = targets[mask]
    values = {
        "log_probs": logs.gather(-1, chosen[:, None])[:, 0],
        "entropy": -(logs.exp() * logs).sum(-1),
        "mean_logits": logits.detach().mean(-1),
        "is_top1": logits.detach().argmax(-1) == chosen,
    }
    spread = {name: torch.zeros_like(mask, dtype=v.dtype).masked_scatter(mask, v) for name, v in values.items()}
    loss = -values["log_probs"].mean()
    return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=getattr(output, "aux_loss", None), **spread)
