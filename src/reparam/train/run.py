"""One training run, from the configuration to a verified adapter.

The steps: load the base model, read and encode the data, attach the adapter, print what will be trained, score, train,
save, read the saved adapter back, verify that it changes the outputs and equals the trained one, and score again. All
files go into one folder:

    adapter/         the trained adapter      config.toml    the resolved configuration
    checkpoint-N/    to resume from           figures.json   scores, losses, counts      loss.png
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from reparam.adapter.adapter import Adapter
from reparam.adapter.context import told
from reparam.adapter.selection import select
from reparam.adapter.without_sites import fill_from, read_back
from reparam.core.text import counted
from reparam.data.batches import Collator, padding_id
from reparam.data.encode import encode
from reparam.data.row import Row
from reparam.data.rows import read_rows
from reparam.errors import ConfigError, NothingLearned
from reparam.evaluation.score import Answer, Score, answer, score_answers, score_loss
from reparam.hf.models import check_not_base, load_tokenizer, vocabulary
from reparam.io.staged import write_file
from reparam.train import optimizer
from reparam.train.checkpoint import newest
from reparam.train.config import Config, dump
from reparam.train.identity import RECORD, check_folder, check_same, clear, identity
from reparam.train.job import Job, Result
from reparam.train.model import attached, by_task, loaded, started
from reparam.train.plot import plot_losses
from reparam.train.show import Show
from reparam.train.state import read_tree, write_tree
from reparam.train.trainer import Trainer

CHECK = "__proof"  # name under which the saved adapter is loaded for verification


def train(config: Config, *, show: Show) -> Result:
    """Train as configured, and write all results into `run.output`.

    After SIGINT or SIGTERM, saves a checkpoint and returns a result with that `signal`. Raises ValueError for errors
    that the user can fix, NotFinite if a loss or gradient is not finite, and NothingLearned if the saved adapter fails
    verification.
    """
    check_folder(config)
    job = prepare(config)
    config = job.config
    show.job(job)
    folder = Path(config.run.output)
    own = identity(job)
    if not config.run.fresh:
        check_same(folder, own)  # before anything is written
    trainer, rates = _trainer(job, show)
    show.rates(rates)
    with trainer.lock:
        if config.run.fresh:
            clear(folder)
        check_same(folder, own)
        write_file(folder / RECORD, (json.dumps({"format": 1, "identity": own}, indent=1) + "\n").encode())
        again = dataclasses.replace(config, run=dataclasses.replace(config.run, fresh=False))
        write_file(folder / "config.toml", dump(again, absolute=True).encode())
        select(job.model, None)
        show.step("scoring the base model on held-out rows")
        before = _scores(job)
        select(job.model, job.adapter.name)
        found = newest(folder)
        show.found(found)
        trainer.train(resume_from_checkpoint=config.run.resume and bool(found.path or found.skipped))
        history = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
        if history:
            plot_losses(history, folder / "loss.png")
        if trainer.interrupted is not None:
            return Result(folder, before[0], (), (), trainer.interrupted)
        show.ended(job.adapter.finish())
        job.adapter.save(folder / "adapter")
        show.step("reading the saved adapter back and scoring it on held-out rows")
        try:
            difference = prove(job, folder / "adapter")
        except NothingLearned:
            shutil.rmtree(folder / "adapter")
            raise
        after = _scores(job)
        pairs = tuple(zip(before[1], after[1], strict=True))
        show.worse(before[0][0], after[0][0])
        result = Result(folder, before[0], after[0], pairs, paging=optimizer.paging(trainer.optimizer))
        write_file(folder / "figures.json", _figures(job, result, difference, history, rates))
    show.result(result, difference)
    return result


def prepare(config: Config) -> Job:
    """Load and check everything that training needs. Writes nothing. Raises ValueError for errors the user can fix."""
    missing = [key for key, value in (("base.path", config.base.path), ("data.train", config.data.train)) if not value]
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)} must be set, on the command line (--{missing[0]} ...) or in the TOML file"
        )
    config = started(config)
    optimizer.check_optimizer(config.optim)
    check_not_base(config.run.output, config.base.path)
    set_seed(config.run.seed)
    tokenizer = load_tokenizer(config.base.path, revision=config.base.revision)
    train_rows, held_out = _rows(config)
    model = loaded(config.base)
    size, data = vocabulary(model), config.data
    method, tasks = by_task(config.method, train_rows)
    encoded, valid = (
        encode(rows, tokenizer, max_length=data.max_length, loss_on=data.loss_on, vocab_size=size, tasks=tasks)
        for rows in (train_rows, held_out)
    )
    adapter = attached(config, model, method)
    optimizer.groups(config.optim, adapter.named_parameters(), adapter.sites)
    return Job(config, adapter.model, tokenizer, adapter, encoded, valid, held_out)


def prove(job: Job, folder: Path) -> float:
    """Verify the saved adapter. Returns the largest absolute change of a logit on up to four held-out rows.

    Raises NothingLearned if no logit changes, or if the logits of the saved and the trained adapter are not equal bit
    for bit.
    """
    examples = [job.valid[i] for i in range(min(4, len(job.valid)))]
    batch = Collator(padding_id(job.tokenizer))(examples)
    device = next(job.model.parameters()).device
    inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
    read_back(job.adapter, folder, name=CHECK)
    job.model.eval()
    logits = {}
    with torch.no_grad():
        for name in (None, job.adapter.name, CHECK):
            with select(job.model, name), told(job.model, batch):
                logits[name] = job.model(**inputs).logits.float()
    difference = float((logits[CHECK] - logits[None]).abs().max())
    if not torch.equal(logits[CHECK], logits[job.adapter.name]):
        raise NothingLearned(
            f"{folder}: the saved adapter, when read back, computes different outputs from the trained one"
        )
    if difference == 0:
        raise NothingLearned(
            f"{folder}: the trained adapter does not change any output on held-out rows; train longer, raise the "
            f"learning rate, or check that the model uses the target modules"
        )
    return difference


def _rows(config: Config) -> tuple[list[Row], list[Row]]:
    """The training rows and the held-out rows."""
    rows = read_rows(config.data.train, config.data.renamed())
    if config.data.valid is not None:
        return rows, read_rows(config.data.valid, config.data.renamed())
    if not 0 < config.data.holdout < 1:
        raise ConfigError(f"data.holdout: {config.data.holdout} is not between 0 and 1; change it, or set data.valid")
    count = max(1, round(len(rows) * config.data.holdout))
    if count >= len(rows):
        raise ConfigError(
            f"{config.data.train}: a file of {counted(len(rows), 'row')} is too small to hold one out; set data.valid"
        )
    chosen = set(random.Random(config.run.seed).sample(range(len(rows)), count))
    return [r for i, r in enumerate(rows) if i not in chosen], [r for i, r in enumerate(rows) if i in chosen]


def _trainer(job: Job, show: Show) -> tuple[Trainer, tuple[optimizer.Rates, ...]]:
    config = job.config
    run, optim = config.run, config.optim
    steps = run.steps(len(job.train))
    tenth = max(1, steps // 10)
    if job.adapter.controller is not None:
        job.adapter.controller.plan(steps)  # raises ValueError now if the schedule does not fit
    arguments = TrainingArguments(
        output_dir=run.output,
        num_train_epochs=run.epochs,
        max_steps=run.max_steps,
        per_device_train_batch_size=run.batch_size,
        per_device_eval_batch_size=run.batch_size,
        gradient_accumulation_steps=run.accumulation,
        learning_rate=optim.learning_rate,
        lr_scheduler_type=optim.schedule,
        warmup_steps=optim.warmup if steps > 1 else 0,  # a warm-up begins at rate 0
        optim=optim.name,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        bf16=run.precision == "bfloat16",
        use_cpu=not torch.accelerator.is_available(),
        activation_checkpointing=run.gradient_checkpointing or None,
        eval_strategy="steps",
        eval_steps=run.eval_every or tenth,
        save_strategy="steps",
        save_steps=run.save_every or tenth,
        save_total_limit=run.keep,
        logging_steps=min(run.log_every, tenth),
        report_to=list(run.loggers) or "none",
        seed=run.seed,
        disable_tqdm=True,
        include_num_input_tokens_seen="all",
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(
        job.model,
        arguments,
        train_dataset=job.train,
        eval_dataset=job.valid,
        data_collator=Collator(padding_id(job.tokenizer)),
        save_trained=lambda folder: _save(job.adapter, folder),
        load_trained=lambda folder: _load(job.adapter, folder),
        row_names=job.train.sources,
        extra_loss=job.adapter.penalty,
        callbacks=[_Bind(job.adapter), show.callback(steps)],
    )
    rates = optimizer.install_optimizer(trainer, optim, job.adapter)
    trainer.remove_callback(PrinterCallback)
    return trainer, rates


class _Bind(TrainerCallback):
    """Passes the optimizer to the adapter when training starts, and logs the auxiliary losses."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, *, optimizer: Any = None, **kwargs: Any
    ) -> None:
        self.adapter.bind(getattr(optimizer, "optimizer", optimizer), total_steps=state.max_steps)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the auxiliary losses to the log entry; the logged loss does not include them."""
        if "loss" in state.log_history[-1]:
            state.log_history[-1].update({f"loss_{name}": value for name, value in self.adapter.losses().items()})


def _save(adapter: Adapter, folder: Path) -> None:
    """Write the adapter into a checkpoint: its files and, if it has a controller, the controller's state."""
    adapter.save(folder / "adapter")
    if adapter.controller is not None:
        write_tree(folder, "controller", adapter.controller.state_dict())


def _load(adapter: Adapter, folder: Path) -> None:
    fill_from(adapter, folder / "adapter")
    if adapter.controller is not None:
        adapter.controller.load_state_dict(read_tree(folder, "controller"))


def _scores(job: Job) -> tuple[tuple[Score, ...], list[Answer]]:
    """Score the model, with the selected adapter, on the held-out rows. Returns the scores and the answers."""
    scores = [score_loss(job.model, job.valid, job.tokenizer, batch=job.config.run.batch_size)]
    answers = answer(job.model, job.tokenizer, job.held_out[: job.config.data.score_rows])
    if answers:
        scores.append(score_answers(answers))
    return tuple(scores), answers


def _figures(
    job: Job, result: Result, difference: float, history: list[dict[str, Any]], rates: tuple[optimizer.Rates, ...]
) -> bytes:
    parameters = sum(p.numel() for p in job.adapter.parameters())
    figures = {
        "base": job.config.base.path,
        "method": job.config.method.name,
        "trained parameters": parameters,
        "positions taken": job.adapter.positions,
        "training rows": job.train.report.rows,
        "held-out rows": job.valid.report.rows,
        "before": [dataclasses.asdict(score) for score in result.before],
        "after": [dataclasses.asdict(score) for score in result.after],
        "worse than the base": not result.after[0].value <= result.before[0].value,
        "largest change of a logit": difference,
        "LoRA+ ratio": job.config.optim.lora_plus,
        "LoRA+ groups": [dataclasses.asdict(group) for group in rates],
        "paging": dataclasses.asdict(result.paging) if result.paging is not None else None,
        "history": history,
    }
    return (json.dumps(figures, indent=1) + "\n").encode()
