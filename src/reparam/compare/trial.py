"""One training run of a comparison: the same as `reparam train` with these settings, and not repeated once it is done.

    runs/<label>-<rate>-<steps>-<seed>-<digest>/     config.toml, figures.json, loss.png and adapter/ as written by
                                                     `reparam train`; result.json is written last

The digest covers the settings, the data and the base, so that after a change only the affected runs are repeated. An
interrupted run continues from its checkpoint. A run fails if its loss or gradient is not finite, if it learns nothing,
or if it runs out of GPU memory; the failure is recorded as its result.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import time
from pathlib import Path
from typing import Any

from reparam.compare.stopwatch import Quiet
from reparam.io.native import read_json
from reparam.io.staged import inside, write_file
from reparam.train.attempt import attempt
from reparam.train.config import Config, dump, resolve

RESULT = "result.json"
CURVE = 6  # evaluations on a learning curve if run.eval_every is not set


@dataclasses.dataclass(frozen=True)
class Trial:
    """A training run to perform; holds plain values, so that it can be sent to another process."""

    label: str
    rate: float
    seed: int
    steps: int
    tuning: bool
    """Whether the run is for tuning: it then evaluates only at its end, generates no answers and keeps no adapter."""
    folder: str
    config: str
    """The training run's configuration, as TOML."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of a trial, as plain values; `result.json` holds the same."""

    label: str
    rate: float
    seed: int
    steps: int
    tuning: bool
    folder: str
    failed: str | None = None
    """Reason of the failure; None if the run succeeded."""
    before: tuple[dict[str, Any], ...] = ()
    """Scores of the base, each as the fields of `Score`."""
    after: tuple[dict[str, Any], ...] = ()
    """Scores of the adapter, each as the fields of `Score`."""
    curve: tuple[tuple[int, float], ...] = ()
    """Pairs of step and held-out loss."""
    parameters: int = 0
    step_seconds: float | None = None
    peak_bytes: int | None = None
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        """First score after training: for a tuning run, the held-out loss. Infinite for a failed run."""
        value = math.inf if self.failed is not None else float(self.after[0]["value"])
        return value if math.isfinite(value) else math.inf


def trial(label: str, config: Config, place: Path, *, tuning: bool, stamp: str) -> Trial:
    """Make the trial of a configuration, with its own folder under `place`; `stamp` identifies the data and base."""
    run, rate = config.run, config.optim.learning_rate
    every = run.eval_every or max(1, run.max_steps // CURVE)
    run = dataclasses.replace(
        run,
        output="",
        eval_every=run.max_steps if tuning else every,
        save_every=run.save_every or max(1, run.max_steps // 2),
        keep=1,
    )
    data = dataclasses.replace(config.data, score_rows=0) if tuning else config.data
    text = dump(dataclasses.replace(config, run=run, data=data))
    digest = hashlib.sha256(f"{text}\0{stamp}".encode()).hexdigest()[:8]
    name = re.sub(r"[^A-Za-z0-9.=+]+", "-", f"{label}-{rate:g}-{run.max_steps}-{run.seed}") + f"-{digest}"
    folder = place / name
    placed = dataclasses.replace(config, run=dataclasses.replace(run, output=str(folder)), data=data)
    return Trial(label, rate, run.seed, run.max_steps, tuning, str(folder), dump(placed))


def done(trial: Trial) -> Outcome | None:
    """Read the outcome of a trial from its folder; None if the trial is not done."""
    file = Path(trial.folder) / RESULT
    if not file.exists():
        return None
    found = read_json(file)
    for key in ("before", "after"):
        found[key] = tuple(found[key])
    found["curve"] = tuple((int(step), float(loss)) for step, loss in found["curve"])
    return Outcome(**{**found, "folder": trial.folder})  # it may have been moved


def perform(trial: Trial) -> Outcome:
    """Run the trial, or read its outcome if it is done.

    Raises Stopped after a signal, and ValueError for settings or data that the user has to fix.
    """
    found = done(trial)
    if found is not None:
        return found
    folder = inside(Path(trial.folder).parent, Path(trial.folder).name)
    folder.mkdir(parents=True, exist_ok=True)
    settings = inside(folder, "config.toml")
    write_file(settings, trial.config.encode())
    show, began = Quiet(), time.perf_counter()
    outcome = Outcome(trial.label, trial.rate, trial.seed, trial.steps, trial.tuning, trial.folder)
    result = attempt(resolve(settings, {}), show=show, keep_adapter=not trial.tuning)
    if isinstance(result, str):
        outcome = dataclasses.replace(outcome, failed=result)
    else:
        figures = read_json(folder / "figures.json")
        outcome = dataclasses.replace(
            outcome,
            before=tuple(figures["before"]),
            after=tuple(figures["after"]),
            curve=tuple((e["step"], e["eval_loss"]) for e in figures["history"] if "eval_loss" in e),
            parameters=figures["trained parameters"],
            step_seconds=show.watch.step_seconds,
            peak_bytes=show.watch.peak_bytes,
        )
    outcome = dataclasses.replace(outcome, seconds=time.perf_counter() - began)
    write_file(inside(folder, RESULT), (json.dumps(dataclasses.asdict(outcome), indent=1) + "\n").encode())
    return outcome
