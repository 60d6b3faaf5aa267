"""The sections of a run's configuration: their keys, default values and ranges. [base] is in `train/base.py`."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from reparam.core.checks import finite, whole
from reparam.errors import ConfigError
from reparam.io.head import Pooling
from reparam.train.data_section import DataConfig as DataConfig
from reparam.train.ranges import ABOVE, LEAST, check, count

Metric = Literal[
    "loss",
    "exact_match",
    "reward_margin",
    "reward_accuracy",
    "mean_reward",
    "accuracy",
    "f1",
    "f1_macro",
    "matthews",
    "pearson",
    "spearman",
    "span_f1",
    "rouge_l",
    "recall_at_1",
    "recall_at_5",
    "recall_at_10",
    "mrr",
]


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Which modules are adapted."""

    targets: tuple[str, ...] | None = None
    """Modules to adapt, separated by commas: all-linear, attention, mlp, experts, router, everything, the end of a
    module's path such as q_proj, or re: followed by a regular expression. The default depends on the method; for most
    it is all-linear. On a vision-language model, these words select in the language model; language, vision and
    projector name its parts."""
    bias: bool = False
    """Also train the biases of the adapted sites."""
    modules_to_save: tuple[str, ...] = ()
    """Modules to train in full and save with the adapter, each given by the end of its path."""
    tie: bool = False
    """Let one update act on all modules that share a weight with a target, such as embedding and output head."""
    divide_expert_rank: bool = False
    """Divide the rank of experts by the number of experts that a token goes to, so that a token uses the rank r."""
    start: str | None = None
    """Folder of a finished adapter, reparam's or PEFT's, to train further. It gives the method and the modules."""

    def __post_init__(self) -> None:
        check(self, "adapter")


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
    neftune: float | None = None
    """NEFTune: strength of the noise that is added to the embeddings in training; usually 5. transformers adds it."""
    label_smoothing: float = 0.0
    """Label smoothing: the weight of all tokens, in equal parts, in the target of the loss; 0 for none."""
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
    beta: float | None = None
    """Preference tuning: how closely the model stays to its start (dpo, kto, grpo), or the weight of the odds ratio
    (orpo). By default 0.1, and 0 for grpo."""

    def __post_init__(self) -> None:
        check(
            self,
            "optim",
            learning_rate=ABOVE,
            warmup=LEAST,
            weight_decay=LEAST,
            neftune=("a number above 0", lambda alpha: alpha is None or (finite(alpha) and alpha > 0)),
            label_smoothing=("a number from 0 to below 1", lambda share: 0 <= share < 1),
            max_grad_norm=("a number of at least 0", lambda norm: norm >= 0),
            lora_plus=("a number above 0", lambda ratio: ratio is None or (finite(ratio) and ratio > 0)),
            lora_plus_embedding=LEAST,
            beta=("a finite number above 0", lambda beta: beta is None or (finite(beta) and beta > 0)),
        )


@dataclasses.dataclass(frozen=True)
class PreferConfig:
    """Preference tuning. The first four have TRL's names and meanings."""

    loss_type: Literal[
        "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down"
    ] = "sigmoid"
    """dpo: the loss of a pair. sigmoid is that of the paper; ipo, hinge (SLiC), robust and the others are TRL's."""
    label_smoothing: float = 0.0
    """dpo: share of pairs whose answers may be in the wrong order, for the losses robust and exo_pair."""
    desirable_weight: float = 1.0
    """kto: weight of good answers. Raise it if there are fewer of them than bad ones."""
    undesirable_weight: float = 1.0
    """kto: weight of bad answers."""
    reward: str | None = None
    """grpo: the function that rewards answers, as FILE.py:function. It is code, so it is taken from the command line
    alone."""
    samples: int = 8
    """grpo: number of answers that are generated for each prompt and compared with each other."""
    new_tokens: int = 256
    """grpo: maximum length of a generated answer in tokens."""
    temperature: float = 1.0
    """grpo: temperature at which answers are sampled."""

    def __post_init__(self) -> None:
        check(
            self,
            "prefer",
            label_smoothing=("a share from 0 to below 0.5", lambda share: 0 <= share < 0.5),
            desirable_weight=LEAST,
            undesirable_weight=LEAST,
            samples=count(2),
            new_tokens=count(1),
            temperature=ABOVE,
        )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Length of the run, batch size, checkpoints, and the output folder."""

    task: Literal["causal", "classification", "token-classification", "seq2seq", "embedding"] = "causal"
    """What the model is for: a causal language model, classes or numbers for texts (classification) or for their words
    (token-classification), texts from an encoder-decoder model (seq2seq), or vectors of texts (embedding)."""
    objective: Literal["sft", "dpo", "orpo", "kto", "grpo"] = "sft"
    """What is trained: answers or texts with sft, pairs of answers with dpo or orpo, judged answers with kto, and the
    model's own answers, by a reward, with grpo."""
    output: str = "out"
    """Output folder for the adapter, checkpoints, configuration, figures and plots."""
    epochs: float = 1.0
    """Number of passes over the training rows."""
    max_steps: int = -1
    """Number of optimizer steps. If it is above 0, run.epochs is ignored."""
    batch_size: int = 8
    """Rows per forward pass on each device."""
    group_by_length: bool = False
    """Make batches of rows of similar length, which need less padding."""
    accumulation: int = 1
    """Number of forward passes per optimizer step."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward and backward passes: float32, or bfloat16 with autocast. Independent of base.dtype."""
    chunked_loss: bool = True
    """Compute the loss from a few logits at a time, only of tokens that carry loss: less memory, the same loss."""
    liger: bool | None = None
    """Compute this loss with Liger's kernel. By default, on a GPU where liger_kernel is installed and can be used."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    eval_every: int = 0
    """Number of steps between evaluations of the held-out loss; 0 means a tenth of the run."""
    metric: Metric = "loss"
    """What evaluations measure beside the loss: exact_match, the share of right answers to run.eval_rows held-out rows
    (sft); reward_margin or reward_accuracy (dpo, orpo, kto); mean_reward (grpo); accuracy, f1, f1_macro, matthews,
    pearson or spearman (classification); accuracy or span_f1 (token-classification); exact_match or rouge_l (seq2seq);
    recall_at_1, recall_at_5, recall_at_10 or mrr (embedding). run.best and run.patience go by it."""
    pooling: Pooling = "mean"
    """embedding: how the vectors of the tokens become one: their mean, the first one (cls), or the last one."""
    temperature: float = 0.05
    """embedding: what similarities are divided by in the loss; 0.05 is the scale 20 of sentence-transformers."""
    eval_rows: int = 50
    """Number of held-out rows to answer at each evaluation, with run.metric exact_match."""
    samples: int = 0
    """Number of answers to held-out rows to print and to store at each evaluation."""
    best: bool = False
    """End with the weights of the best evaluation by run.metric. A checkpoint is saved at each evaluation."""
    patience: int = 0
    """Stop after this number of evaluations without a better one, with the best weights; 0 for never."""
    save_every: int = 0
    """Number of steps between checkpoints; 0 means a tenth of the run, or run.eval_every with run.best."""
    keep: int = 2
    """Number of checkpoints to keep, beside the best one."""
    log_every: int = 10
    """Number of steps between log lines."""
    loggers: tuple[str, ...] = ()
    """Loggers of transformers, separated by commas: tensorboard, wandb, mlflow, trackio and others."""
    name: str | None = None
    """Name of the run in the loggers. By default, that of the output folder."""
    resume: bool = True
    """Continue from the newest complete checkpoint in the output folder, if there is one."""
    fresh: bool = False
    """Delete what an earlier run wrote into the output folder, and start anew."""
    seed: int = 0
    """Seed of all random numbers: order of rows, dropout, initial values."""

    def __post_init__(self) -> None:
        check(
            self,
            "run",
            epochs=ABOVE,
            max_steps=("-1 or a whole number of at least 1", lambda steps: steps == -1 or whole(steps, 1)),
            seed=("a whole number from 0 to 4294967295", lambda seed: 0 <= seed < 2**32),
            **dict.fromkeys(("batch_size", "accumulation", "keep", "log_every"), count(1)),
            **dict.fromkeys(("eval_every", "save_every", "samples", "patience"), count(0)),
            eval_rows=count(1),
            temperature=ABOVE,
        )
        if self.keeps_best and self.keep == 1:
            raise ConfigError("run.keep: 1 with run.best or run.patience: expected at least 2, the newest and the best")
        if self.keeps_best and self.save_every not in (0, self.eval_every):
            raise ConfigError(
                f"run.save_every: {self.save_every} with run.best or run.patience, which save a checkpoint at each "
                f"evaluation: leave it out, or set run.eval_every to the same number"
            )

    @property
    def keeps_best(self) -> bool:
        """Whether the run ends with its best weights."""
        return self.best or self.patience > 0

    def steps(self, examples: int, processes: int = 1) -> int:
        """Number of optimizer steps of a run over this many training examples, as transformers counts them.

        Each of the `processes` takes `batch_size` rows in a forward pass. The last step of an epoch may have fewer.
        """
        batches = math.ceil(examples / (self.batch_size * processes))
        an_epoch = max(1, math.ceil(batches / self.accumulation))
        return self.max_steps if self.max_steps > 0 else max(1, math.ceil(an_epoch * self.epochs))
