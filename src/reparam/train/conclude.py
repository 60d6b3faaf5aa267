"""The end of a run: the trained adapter is saved, read back, verified and scored."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from reparam.adapter.context import told
from reparam.adapter.selection import select
from reparam.adapter.without_sites import read_back
from reparam.errors import NothingLearned
from reparam.evaluation.score import Answer, Score
from reparam.io.staged import write_file
from reparam.train import optimizer
from reparam.train.job import Job, Result
from reparam.train.objectives.objective import Objective
from reparam.train.show import Show
from reparam.train.trainer import Resumable

CHECK = "__proof"  # name under which the saved adapter is loaded for verification


def conclude(
    job: Job,
    objective: Objective,
    trainer: Resumable,
    rates: tuple[optimizer.Rates, ...],
    before: tuple[tuple[Score, ...], list[Answer]],
    show: Show,
) -> Result:
    """Save the trained adapter, read it back, score it, and write the figures."""
    folder = trainer.run_folder
    job.adapter.save(folder / "adapter")
    show.step("reading the saved adapter back and scoring it on held-out rows")
    try:
        difference = _prove(job, objective, folder / "adapter")
    except NothingLearned:
        shutil.rmtree(folder / "adapter")
        raise
    after = objective.score(job)
    pairs = tuple(zip(before[1], after[1], strict=True))
    show.worse(before[0][0], after[0][0])
    result = Result(folder, before[0], after[0], pairs, paging=optimizer.paging(trainer.optimizer))
    write_file(folder / "figures.json", _figures(job, trainer, result, difference, rates))
    show.result(result, difference)
    return result


def history_of(trainer: Resumable) -> list[dict[str, Any]]:
    """The log entries with a loss, in the order of the steps."""
    return [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]


def _prove(job: Job, objective: Objective, folder: Path) -> float:
    """Verify the saved adapter. Returns the largest absolute change of an output on up to four held-out rows.

    Raises NothingLearned if no output changes, or if those of the saved and the trained adapter are not equal bit for
    bit.
    """
    read_back(job.adapter, folder, name=CHECK)
    job.model.eval()
    difference, same = 0.0, True
    for batch, compute in objective.outputs(job):
        logits = {}
        with torch.no_grad():
            for name in (None, job.adapter.name, CHECK):
                with select(job.model, name), told(job.model, batch):
                    logits[name] = compute()
        difference = max(difference, float((logits[CHECK].float() - logits[None].float()).abs().max()))
        same = same and torch.equal(logits[CHECK], logits[job.adapter.name])
    if not same:
        raise NothingLearned(
            f"{folder}: the saved adapter, when read back, computes different outputs from the trained one"
        )
    if difference == 0:
        raise NothingLearned(
            f"{folder}: the trained adapter does not change any output on held-out rows; train longer, raise the "
            f"learning rate, or check that the model uses the target modules"
        )
    return difference


def _figures(
    job: Job, trainer: Resumable, result: Result, difference: float, rates: tuple[optimizer.Rates, ...]
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
        "worse than the base": result.after[0].worse_than(result.before[0]),
        "best step": trainer.state.best_global_step if job.config.run.keeps_best else None,
        "largest change of a logit": difference,
        "LoRA+ ratio": job.config.optim.lora_plus,
        "LoRA+ groups": [dataclasses.asdict(group) for group in rates],
        "paging": dataclasses.asdict(result.paging) if result.paging is not None else None,
        "history": history_of(trainer),
    }
    return (json.dumps(figures, indent=1) + "\n").encode()
