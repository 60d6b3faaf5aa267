"""A stage of a model that sees, from the configuration to a verified model. All files go into one folder:

vora/            the model: its adapter, the patch embedding, the settings
checkpoint-N/    to resume from, with the heads of a distillation
config.toml      the resolved configuration
figures.json     scores, losses, counts
loss.png
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, TrainingArguments

from reparam.adapter.selection import select
from reparam.adapter.without_sites import fill_from, read_back
from reparam.errors import ConfigError, FormatError, NothingLearned
from reparam.evaluation.score import Answer, Score
from reparam.io.native import parse_tensors, read_bytes
from reparam.io.staged import write_file
from reparam.train import optimizer, processes
from reparam.train.checkpoint import Found, newest
from reparam.train.conclude import CHECK, history_of
from reparam.train.evaluating import Answering, Evaluated
from reparam.train.guard import stopped_early
from reparam.train.identity import STEPS, check_folder, check_same, clear, write_record
from reparam.train.job import Result
from reparam.train.loggers import place_files, reporting
from reparam.train.losses import loss_of
from reparam.train.plot import plot_losses
from reparam.train.run import Bind, arguments
from reparam.train.speed import slow_dtype
from reparam.train.state import read_tree, write_tree
from reparam.train.trainer import Resumable
from reparam.vision.config import StageConfig
from reparam.vision.files import TENSORS, save
from reparam.vision.found import ADAPTER, RUN
from reparam.vision.job import Trained, VisionJob, prepare
from reparam.vision.model import VoRA
from reparam.vision.rows import collator
from reparam.vision.scores import answered, scored
from reparam.vision.show import Shows


def train(stage: StageConfig, *, show: Shows) -> Result:
    """Run a stage as configured, and write all results into `run.output`.

    After SIGINT or SIGTERM, saves a checkpoint and returns a result with that `signal`. Raises ValueError for errors
    that the user can fix, NotFinite if a loss or gradient is not finite, and NothingLearned if the saved model fails
    verification.
    """
    held = _checked(stage)
    config, vora, folder = held.job.config, held.vora, Path(held.job.config.run.output)
    show.vision_job(held)
    if slow := slow_dtype(vora.language, config.run.precision):
        show.note(slow)
    own = held.identity
    if not config.run.fresh:
        check_same(folder, own, longer=held.job.adapter.controller is None)
    losses = loss_of(held.job, show)
    trainer, rates = _trainer(held, show)
    show.rates(rates)
    with trainer.lock, losses, contextlib.ExitStack() as begun:
        if config.run.fresh:
            clear(folder)
        check_same(folder, own, longer=held.job.adapter.controller is None)
        steps_before = write_record(folder, own)
        again = dataclasses.replace(config, run=dataclasses.replace(config.run, fresh=False))
        write_file(folder / "config.toml", dataclasses.replace(stage, train=again).dump(absolute=True).encode())
        found = newest(folder)
        show.found(found, steps=own[STEPS], before=steps_before, schedule=config.optim.schedule)
        begun.enter_context(reporting(trainer))
        show.step("scoring the model on held-out rows before training")
        with select(vora.language, None):
            before = _scored(held)
        trainer.train(resume_from_checkpoint=config.run.resume and bool(found.path or found.skipped))
        if history_of(trainer):
            plot_losses(history_of(trainer), folder / "loss.png")
        if trainer.interrupted is not None:
            return Result(folder, before[0], (), (), trainer.interrupted)
        show.best(trainer.state, run=config.run, early=stopped_early(trainer.callback_handler.callbacks))
        show.ended(held.job.adapter.finish())
        return _concluded(held, trainer, before, show)


def rehearse(stage: StageConfig, *, show: Shows) -> None:
    """Load and check everything that `train` needs, and show what it would do. Writes nothing."""
    held = _checked(stage)
    config, own = held.job.config, held.identity
    if not config.run.fresh:
        check_same(Path(config.run.output), own, longer=held.job.adapter.controller is None)
    TrainingArguments(**arguments(config, own[STEPS]))  # raises ValueError for a wrong one
    show.vision_job(held)
    show.vision_plan(stage, own[STEPS], Found(None, []) if config.run.fresh else newest(Path(config.run.output)))


def _checked(stage: StageConfig) -> VisionJob:
    if processes.count() > 1:
        raise ConfigError("the training of models that see runs in one process: call it without torchrun")
    check_folder(stage.train)
    return prepare(stage)


def _scored(held: VisionJob) -> tuple[tuple[Score, ...], list[Answer]]:
    config = held.job.config
    rows, batch = list(held.job.held_out), config.run.batch_size
    return scored(held.vora, held.valid, rows, batch=batch, answers=config.data.score_rows)


class _Losses(TrainerCallback):
    """Adds to each log entry the loss of the teacher in the last step: its mean, and that of each pair of states."""

    def __init__(self, vora: VoRA) -> None:
        self.vora = vora

    def on_log(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        distillation = self.vora.distillation
        if distillation is not None and "loss" in state.log_history[-1] and distillation.last:
            last = distillation.last
            state.log_history[-1]["loss_distillation"] = sum(last) / len(last)
            state.log_history[-1]["loss_distillation_by_pair"] = last


def _trainer(held: VisionJob, show: Shows) -> tuple[Resumable, tuple[optimizer.Rates, ...]]:
    vora, job = held.vora, held.job
    steps = job.config.run.steps(len(held.train), processes.count())
    if job.adapter.controller is not None:
        job.adapter.controller.plan(steps)
    trainer = Evaluated(
        vora,
        TrainingArguments(**arguments(job.config, steps)),
        train_dataset=held.train,
        eval_dataset=held.valid,
        data_collator=collator(held.train.fill),
        save_trained=lambda folder: _save(vora, folder),
        load_trained=lambda folder: _load(vora, folder),
        row_names=held.train.sources,
        extra_loss=lambda: _extra(vora),
        callbacks=[Bind(job.adapter), _Losses(vora), show.callback(steps), *_evaluating(held, show)],
    )
    rates = optimizer.install_optimizer(trainer, job.config.optim, Trained(vora))  # type: ignore[arg-type]
    trainer.remove_callback(PrinterCallback)
    place_files(trainer.callback_handler.callbacks, job.config.run)
    return trainer, rates


def _evaluating(held: VisionJob, show: Shows) -> list[TrainerCallback]:
    """The callbacks that answer held-out rows at evaluations, and that stop the run early."""
    run, found = held.job.config.run, []
    if run.metric == "exact_match" or run.samples:
        ask = functools.partial(answered, held.vora, images=held.images, batch=run.batch_size)
        found.append(Answering(held.job, show, ask=ask))
    return found + ([EarlyStoppingCallback(run.patience)] if run.patience else [])


def _extra(vora: VoRA) -> Tensor | None:
    """What is added to the language model's loss: the teacher's, and the penalty of the method."""
    assert vora.adapter is not None
    found = [vora.distillation.total() if vora.distillation is not None else None, vora.adapter.penalty()]
    given = [loss for loss in found if loss is not None]
    return torch.stack(given).sum() if given else None


def _save(vora: VoRA, folder: Path) -> None:
    """Write what is trained into a checkpoint: adapter, patch embedding, heads, and the state of a controller."""
    assert vora.adapter is not None
    vora.adapter.save(folder / ADAPTER)
    heads = vora.distillation.state_dict() if vora.distillation is not None else {}
    write_tree(folder, "vision", {"embedding": vora.embedding.state_dict(), "heads": dict(heads)})
    if vora.adapter.controller is not None:
        write_tree(folder, "controller", vora.adapter.controller.state_dict())


def _load(vora: VoRA, folder: Path) -> None:
    assert vora.adapter is not None
    fill_from(vora.adapter, folder / ADAPTER)
    tree = read_tree(folder, "vision")
    try:
        vora.embedding.load_state_dict(tree["embedding"])
        if vora.distillation is not None:
            vora.distillation.load_state_dict(tree["heads"])
    except (KeyError, RuntimeError) as error:
        raise FormatError(f"{folder}: the patch embedding or the heads do not fit: {error}") from None
    if vora.adapter.controller is not None:
        vora.adapter.controller.load_state_dict(read_tree(folder, "controller"))


def _concluded(
    held: VisionJob, trainer: Resumable, before: tuple[tuple[Score, ...], list[Answer]], show: Shows
) -> Result:
    """Save the trained model, read it back, score it, and write the figures."""
    folder = trainer.run_folder
    save(held.vora, folder / RUN, overwrite=True)
    show.step("reading the saved model back and scoring it on held-out rows")
    difference = _prove(held, folder / RUN)
    after = _scored(held)
    result = Result(
        folder,
        before[0],
        after[0],
        tuple(zip(before[1], after[1], strict=True)),
        paging=optimizer.paging(trainer.optimizer),
    )
    write_file(folder / "figures.json", _figures(held, trainer, result, difference))
    show.vision_result(result, difference)
    return result


@torch.no_grad()
def _prove(held: VisionJob, folder: Path) -> float:
    """Verify the saved model on up to four held-out rows. Returns the largest change of a logit by its adapter.

    Raises NothingLearned if no logit changes, or if the saved and the trained model differ in a bit.
    """
    vora, collate = held.vora, collator(held.valid.fill)
    assert vora.adapter is not None
    vora.eval()
    read_back(vora.adapter, folder / ADAPTER, name=CHECK)
    trained, file = vora.embedding, folder / TENSORS
    from_file = type(trained)(vora.vision, trained.out.out_features).to(vora.device, trained.out.weight.dtype)
    from_file.load_state_dict(parse_tensors(read_bytes(file), file))
    difference, same = 0.0, True
    for index in range(min(4, len(held.valid))):
        batch = collate([held.valid[index]])
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "image_ids", "pixel_values")}
        inputs = {key: value.to(vora.device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
        logits = {}
        for name in (None, vora.adapter.name, CHECK):
            vora.embedding = from_file if name == CHECK else trained
            with select(vora.language, name):
                logits[name] = vora(**inputs).logits
        difference = max(difference, float((logits[CHECK].float() - logits[None].float()).abs().max()))
        same = same and torch.equal(logits[CHECK], logits[vora.adapter.name])
    vora.embedding = trained
    if not same:
        raise NothingLearned(
            f"{folder}: the saved model, when read back, computes different outputs from the trained one"
        )
    if difference == 0:
        raise NothingLearned(
            f"{folder}: the trained adapter does not change any output on held-out rows; train longer, or raise the "
            f"learning rate"
        )
    return difference


def _figures(held: VisionJob, trainer: Resumable, result: Result, difference: float) -> bytes:
    vora, config = held.vora, held.job.config
    assert vora.adapter is not None

    def count(parameters: list[nn.Parameter]) -> int:
        return sum(p.numel() for p in parameters)

    figures = {
        "stage": held.stage.stage,
        "base": config.base.path,
        "method": config.method.name,
        "blocks": vora.blocks,
        "trained parameters of the adapter": count(vora.adapter.parameters()),
        "parameters of the patch embedding": count(list(vora.embedding.parameters())),
        "parameters of heads, which are dropped": count(list(vora.distillation.parameters()))
        if vora.distillation
        else 0,
        "tokens of an image": vora.vision.side**2,
        "training rows": held.job.train.report.rows,
        "held-out rows": held.job.valid.report.rows,
        "rows with images": len(held.images),
        "before": [dataclasses.asdict(score) for score in result.before],
        "after": [dataclasses.asdict(score) for score in result.after],
        "best step": trainer.state.best_global_step if config.run.keeps_best else None,
        "largest change of a logit": difference,
        "history": history_of(trainer),
    }
    return (json.dumps(figures, indent=1) + "\n").encode()
