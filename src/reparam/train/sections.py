"""The sections of a run's configuration: their keys, default values and ranges. [base] is in `train/base.py`."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from reparam.core.checks import finite, whole
from reparam.data.chat import LossOn
from reparam.errors import ConfigError


def _check(settings: object, section: str, **rules: tuple[str, bool]) -> None:
    """Raise ConfigError that names every key whose rule, a pair of the expected range and a result, is not met."""
    wrong = [
        f"{section}.{key}: {getattr(settings, key)!r}: expected {text}"
        for key, (text, right) in rules.items()
        if not right
    ]
    if wrong:
        raise ConfigError("; ".join(wrong))


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The rows to train on, and the held-out rows."""

    train: str = ""
    """Training rows: a file (JSONL, JSON, CSV, TSV, Parquet, Arrow), a glob, a folder, a data set such as owner/name,
    or - for standard input."""
    valid: str | None = None
    """Held-out rows to score. By default, a share of the training rows is held out."""
    columns: tuple[str, ...] = ()
    """Under which keys the rows hold those of a format, such as prompt=question,completion=answer. By default, the keys
    tell the format."""
    holdout: float = 0.05
    """Share of the training rows to hold out when data.valid is not set."""
    max_length: int = 1024
    """Maximum length of a row in tokens. Longer chats are cut at the end; longer texts are split."""
    loss_on: LossOn = "answers"
    """Which tokens of chats and completions count in the loss: answers, the last answer of a chat, or all."""
    score_rows: int = 200
    """Number of held-out rows to answer before and after training, to count exact matches."""

    def __post_init__(self) -> None:
        self.renamed()
        idle = self.valid is not None and self.holdout == 0
        _check(
            self,
            "data",
            holdout=("a share above 0 and below 1", idle or 0 < self.holdout < 1),
            max_length=("a whole number of at least 1", whole(self.max_length, 1)),
            score_rows=("a whole number of at least 0", whole(self.score_rows, 0)),
        )

    def renamed(self) -> dict[str, str]:
        """`columns` as a dictionary from a format's key to the rows' key. Raises ConfigError for another form."""
        pairs = [pair.partition("=") for pair in self.columns]
        if wrong := [pair for pair, (key, _, name) in zip(self.columns, pairs, strict=True) if not key or not name]:
            raise ConfigError(f"data.columns: {wrong[0]!r}: expected key=name, such as prompt=question")
        return {key.strip(): name.strip() for key, _, name in pairs}


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Which modules are adapted."""

    targets: tuple[str, ...] | None = None
    """Modules to adapt, separated by commas: all-linear, attention, mlp, everything, the end of a module's path such as
    q_proj, or re: followed by a regular expression. The default depends on the method; for most it is all-linear."""
    bias: bool = False
    """Also train the biases of the adapted sites."""
    modules_to_save: tuple[str, ...] = ()
    """Modules to train in full and save with the adapter, each given by the end of its path."""
    start: str | None = None
    """Folder of a finished adapter, reparam's or PEFT's, to train further. It gives the method and the modules."""


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer. Names and meanings are those of transformers' TrainingArguments."""

    name: str = "adamw_torch"
    """Optimizer, as transformers names it. For paged_adamw_32bit, paged_adamw_8bit and adamw_8bit, reparam has its own
    implementations."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    schedule: str = "cosine"
    """Learning-rate schedule: cosine, linear, constant, constant_with_warmup, or another one of transformers."""
    warmup: float = 0.03
    """Number of linear warm-up steps; a value below 1 is a share of all steps."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Maximum norm of the gradient; a larger gradient is scaled down to it."""
    budget: int | str = "512MiB"
    """Maximum memory on the device for the states of a paged optimizer, in bytes or as 64MiB or 2GiB. The rest is paged
    out."""
    page: int | str = "1MiB"
    """Size of the pages that a paged optimizer moves, in bytes or as 1MiB."""
    lora_plus: float | None = None
    """LoRA+: learning rate of B as a multiple of optim.learning_rate; usually 16. --method lora+ sets it to 16."""
    lora_plus_embedding: float = 1e-6
    """LoRA+: learning rate of adapted embeddings, as an absolute value."""
    lora_plus_vectors: Literal["out", "in"] = "out"
    """LoRA+: whether biases, norms and DoRA's magnitudes have the learning rate of B (out) or of A (in)."""

    def __post_init__(self) -> None:
        _check(
            self,
            "optim",
            learning_rate=("a number above 0", finite(self.learning_rate) and self.learning_rate > 0),
            warmup=("a number of at least 0", finite(self.warmup) and self.warmup >= 0),
            weight_decay=("a number of at least 0", finite(self.weight_decay) and self.weight_decay >= 0),
            max_grad_norm=("a number of at least 0", self.max_grad_norm >= 0),
        )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Length of the run, batch size, checkpoints, and the output folder."""

    output: str = "out"
    """Output folder for the adapter, checkpoints, configuration, figures and plots."""
    epochs: float = 1.0
    """Number of passes over the training rows."""
    max_steps: int = -1
    """Number of optimizer steps. If it is above 0, run.epochs is ignored."""
    batch_size: int = 8
    """Rows per forward pass on each device."""
    accumulation: int = 1
    """Number of forward passes per optimizer step."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward and backward passes: float32, or bfloat16 with autocast. Independent of base.dtype."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    eval_every: int = 0
    """Number of steps between evaluations of the held-out loss; 0 means a tenth of the run."""
    save_every: int = 0
    """Number of steps between checkpoints; 0 means a tenth of the run."""
    keep: int = 2
    """Number of checkpoints to keep."""
    log_every: int = 10
    """Number of steps between log lines."""
    loggers: tuple[str, ...] = ()
    """Loggers of transformers, such as tensorboard, separated by commas."""
    resume: bool = True
    """Continue from the newest complete checkpoint in the output folder, if there is one."""
    fresh: bool = False
    """Delete what an earlier run wrote into the output folder, and start anew."""
    seed: int = 0
    """Seed of all random numbers: order of rows, dropout, initial values."""

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("batch_size", "accumulation", "keep", "log_every"), ("a whole number of at least 1", 1))
        counts |= dict.fromkeys(("eval_every", "save_every"), ("a whole number of at least 0", 0))
        _check(
            self,
            "run",
            epochs=("a number above 0", finite(self.epochs) and self.epochs > 0),
            max_steps=("-1 or a whole number of at least 1", self.max_steps == -1 or whole(self.max_steps, 1)),
            **{key: (text, whole(getattr(self, key), least)) for key, (text, least) in counts.items()},
        )

    def steps(self, examples: int) -> int:
        """Number of optimizer steps of a run over this many training examples."""
        rows = self.batch_size * self.accumulation
        return self.max_steps if self.max_steps > 0 else max(1, math.ceil(examples / rows * self.epochs))
