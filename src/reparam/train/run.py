"""One training run, from the configuration to a verified adapter.

The steps: load the base model, read and encode the data, attach the adapter, print what will be trained, score, train,
save, read the saved adapter back, verify that it changes the outputs and equals the trained one, and score again. All
files go into one folder:

    adapter/         the trained adapter      config.toml    the resolved configuration
    checkpoint-N/    to resume from           figures.json   scores, losses, counts      loss.png
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from reparam.adapter.adapter import Adapter
from reparam.adapter.selection import select
from reparam.adapter.without_sites import fill_from
from reparam.data.batches import Encoded
from reparam.data.packing import Packed
from reparam.errors import ConfigError
from reparam.evaluation.score import Answer, Score
from reparam.hf.models import check_not_base, vocabulary
from reparam.hf.packed import unpackable_reason
from reparam.hf.tasks import pad_with
from reparam.io.staged import write_file
from reparam.train import optimizer, processes
from reparam.train.checkpoint import Found, newest
from reparam.train.conclude import conclude, history_of
from reparam.train.config import Config, check_inputs, dump
from reparam.train.data import Data
from reparam.train.evaluating import evaluating, rank
from reparam.train.guard import stopped_early
from reparam.train.identity import STEPS, check_folder, check_same, clear, identity, settings_of, write_record
from reparam.train.job import Job, Result
from reparam.train.loggers import check_loggers, name_of, place_files, record, reporting
from reparam.train.model import attached, loaded, started
from reparam.train.objectives import objective_of
from reparam.train.objectives.objective import Objective
from reparam.train.reading import tokenizer_of
from reparam.train.show import Show
from reparam.train.speed import slow_dtype
from reparam.train.state import read_tree, write_tree
from reparam.train.trainer import Resumable


def train(config: Config, *, show: Show, watch: Callable[[Job, Resumable], TrainerCallback] | None = None) -> Result:
    """Train as configured, and write all results into `run.output`.

    `watch` gives a callback for the trainer, before the first step (see `plan/watch.py`).

    After SIGINT or SIGTERM, saves a checkpoint and returns a result with that `signal`. Raises ValueError for errors
    that the user can fix, NotFinite if a loss or gradient is not finite, and NothingLearned if the saved adapter fails
    verification.

    If torchrun started several processes, all of them call this: each trains on its own rows, and the first one does
    all the rest (see `train/processes.py`).
    """
    processes.connect()
    if processes.rank() > 0:
        show = Show(Console(quiet=True))
    objective = objective_of(config)
    job = processes.together(lambda: _prepared(config))
    config = job.config
    show.job(job)
    if slow := slow_dtype(job.model, config.run.precision):
        show.note(slow)
    folder = Path(config.run.output)
    losses = processes.together(lambda: objective.loss(job, show))
    own = processes.first(lambda: _identified(job))  # before anything is written
    trainer, rates = processes.together(lambda: _trainer(job, objective, show))
    show.rates(rates)
    if watch is not None:
        trainer.add_callback(watch(job, trainer))
    with contextlib.ExitStack() as held:
        steps_before = processes.first(lambda: _begun(job, own, trainer, held))
        found = processes.first(lambda: newest(folder))
        show.found(found, steps=own[STEPS], before=steps_before, schedule=config.optim.schedule)
        held.enter_context(reporting(trainer))
        before = processes.first(lambda: _scored_before(job, objective, show))
        with losses:
            trainer.train(resume_from_checkpoint=config.run.resume and bool(found.path or found.skipped))
        for text in job.stream.notes() if job.stream is not None else ():
            show.note(text)
        if processes.rank() == 0 and history_of(trainer):
            from reparam.train.plot import plot_losses  # matplotlib, which takes half a second to import

            plot_losses(history_of(trainer), folder / "loss.png")
        if trainer.interrupted is not None:
            return Result(folder, before[0], (), (), trainer.interrupted)
        show.best(trainer.state, run=config.run, early=stopped_early(trainer.callback_handler.callbacks))
        show.ended(job.adapter.finish())
        return processes.first(lambda: conclude(job, objective, trainer, rates, before, show))


def rehearse(config: Config, *, show: Show) -> None:
    """Load and check everything that `train` needs, and show what it would do. Writes nothing.

    Raises the errors that `train` would raise before its first step.
    """
    job = _prepared(config)
    _identified(job)
    steps = _steps(job)
    TrainingArguments(**arguments(job.config, steps))  # raises ValueError for a wrong one
    show.job(job)
    found = Found(None, []) if config.run.fresh else newest(Path(config.run.output))
    show.plan(job.config, steps, found)


def _prepared(config: Config) -> Job:
    check_folder(config)
    return prepare(config)


def _identified(job: Job) -> dict[str, Any]:
    own = identity(job)
    if not job.config.run.fresh:
        check_same(Path(job.config.run.output), own, longer=job.adapter.controller is None)
    return own


def _begun(job: Job, own: dict[str, Any], trainer: Resumable, held: contextlib.ExitStack) -> int:
    """Lock the run folder, and record the run there. Returns the number of steps in the call before."""
    config, folder = job.config, trainer.run_folder
    held.enter_context(trainer.lock)
    if config.run.fresh:
        clear(folder)
    check_same(folder, own, longer=job.adapter.controller is None)
    before = write_record(folder, own)
    again = dataclasses.replace(config, run=dataclasses.replace(config.run, fresh=False))
    write_file(folder / "config.toml", dump(again, absolute=True).encode())
    return before


def _scored_before(job: Job, objective: Objective, show: Show) -> tuple[tuple[Score, ...], list[Answer]]:
    show.step("scoring the base model on held-out rows")
    with select(job.model, objective.start(job)):
        return objective.score(job)


def prepare(config: Config) -> Job:
    """Load and check everything that training needs. Writes nothing. Raises ValueError for errors the user can fix."""
    check_inputs(config)
    config, objective = started(config), objective_of(config)
    optimizer.check_optimizer(config.optim)
    check_loggers(config.run.loggers)
    check_not_base(config.run.output, config.base.path)
    set_seed(config.run.seed)
    tokenizer = tokenizer_of(config)
    data = objective.data(config, tokenizer)  # before the model, which may take minutes
    model = loaded(config.base, data.head)
    if data.head is not None:
        pad_with(model, tokenizer)
    data.check_vocabulary(vocabulary(model), tokenizer)
    adapter = attached(config, model, data.method, data.head)
    adapter.prompt_format = data.prompt_format
    optimizer.groups(config.optim, adapter.named_parameters(), adapter.sites)
    packed = _packed(config, adapter, data)
    return Job(config, adapter.model, tokenizer, adapter, data.train, data.valid, data.held_out, packed, data.stream)


def _packed(config: Config, adapter: Adapter, data: Data) -> Packed | None:
    """The training rows in packs, if they are to be packed. Raises ConfigError if the model would mix them.

    A stream makes its packs itself.
    """
    if not config.data.packing:
        return None
    if config.run.group_by_length:
        raise ConfigError("run.group_by_length has no effect on packs, which are all full: leave out one of the two")
    assert isinstance(data.train, Encoded)  # the other objectives refuse to pack
    if reason := unpackable_reason(adapter.model):
        raise ConfigError(f"data.packing cannot be used here: {reason}; leave it out")
    return Packed(data.train, config.data.max_length) if data.stream is None else None


def _steps(job: Job) -> int:
    """The number of steps of the run. Raises ValueError if a schedule of the method does not fit it."""
    steps = job.config.run.steps(len(job.drawn), processes.count())
    if job.adapter.controller is not None:
        job.adapter.controller.plan(steps)
    return steps


def arguments(config: Config, steps: int) -> dict[str, Any]:
    """transformers' arguments of a run of so many steps."""
    run, optim = config.run, config.optim
    tenth = max(1, steps // 10)
    return dict(  # noqa: C408  (these are keyword arguments)
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
        save_steps=run.save_every or (run.eval_every if run.keeps_best else 0) or tenth,
        save_total_limit=run.keep,
        load_best_model_at_end=run.keeps_best,
        metric_for_best_model=rank(run) if run.keeps_best else None,
        greater_is_better=run.metric != "loss" if run.keeps_best else None,
        train_sampling_strategy=_order(config),
        neftune_noise_alpha=optim.neftune,
        logging_steps=min(run.log_every, tenth),
        report_to=list(run.loggers) or "none",
        run_name=name_of(run),
        seed=run.seed,
        disable_tqdm=True,
        include_num_input_tokens_seen="all",
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_broadcast_buffers=False,  # all processes hold the same ones, quantized matrices among them
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _order(config: Config) -> str:
    """The order of the rows, as transformers names it. A stream is in random order already."""
    return "sequential" if config.data.streaming else "group_by_length" if config.run.group_by_length else "random"


def _trainer(job: Job, objective: Objective, show: Show) -> tuple[Resumable, tuple[optimizer.Rates, ...]]:
    steps = _steps(job)
    trainer = objective.trainer(
        job,
        arguments(job.config, steps),
        save_trained=lambda folder: _save(job.adapter, folder),
        load_trained=lambda folder: _load(job.adapter, folder),
        row_names=job.stream.names if job.stream is not None else job.train.sources,
        extra_loss=job.adapter.penalty,
        callbacks=[Bind(job.adapter), show.callback(steps), *evaluating(job, objective, show)],
    )
    rates = optimizer.install_optimizer(trainer, job.config.optim, job.adapter)
    trainer.remove_callback(PrinterCallback)
    place_files(trainer.callback_handler.callbacks, job.config.run)
    trainer.callback_handler.callbacks.sort(key=lambda one: not isinstance(one, Bind))  # before the loggers
    record(trainer.args, settings_of(job.config))
    return trainer, rates


class Bind(TrainerCallback):
    """Passes the optimizer to the adapter when training starts, and logs the auxiliary losses."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, *, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Bind the adapter to the optimizer."""
        self.adapter.bind(getattr(optimizer, "optimizer", optimizer), total_steps=state.max_steps)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the auxiliary losses to the log entry and to what loggers get; the logged loss does not include them."""
        if "loss" in state.log_history[-1]:
            found = {f"loss_{name}": value for name, value in self.adapter.losses().items()}
            state.log_history[-1].update(found)
            logs.update(found)


def _save(adapter: Adapter, folder: Path) -> None:
    """Write the adapter into a checkpoint: its files and, if it has a controller, the controller's state."""
    adapter.save(folder / "adapter")
    if adapter.controller is not None:
        write_tree(folder, "controller", adapter.controller.state_dict())


def _load(adapter: Adapter, folder: Path) -> None:
    fill_from(adapter, folder / "adapter")
    if adapter.controller is not None:
        adapter.controller.load_state_dict(read_tree(folder, "controller"))
