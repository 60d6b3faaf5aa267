"""A comparison says what it takes before it runs, and keeps time for one scored run of each contestant."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from reparam.compare import run as run_module
from reparam.compare.forecast import runs, seconds, seed_seconds
from reparam.compare.plan import CompareConfig, read_plan
from reparam.compare.run import compare
from reparam.compare.trial import Outcome, Trial
from reparam.compare.workers import Late


def outcome(trial: Trial, took: float, each: float | None) -> Outcome:
    score = {"name": "loss per token", "value": 1.0, "low": 0.9, "high": 1.1, "rows": 4}
    where = (trial.label, trial.rate, trial.seed, trial.steps, trial.tuning, trial.folder)
    return Outcome(*where, before=(score,), after=(score,), parameters=10, step_seconds=each, seconds=took)


def test_the_most_runs_and_their_steps() -> None:
    plan = CompareConfig(rates=(1e-4, 1e-3, 1e-2), rungs=(0.25, 0.5), seeds=2)
    assert runs(plan, 3, 40) == [(9, 10), (6, 20), (6, 40)]
    assert runs(plan, 1, 1) == [(3, 1), (2, 1), (2, 1)]


def test_seconds_grow_with_the_steps_alone() -> None:
    short = outcome(Trial("a", 1e-3, 0, 10, True, "", ""), 25.0, 2.0)  # 5 s do not depend on the steps
    assert seconds(short, 10) == 25
    assert seconds(short, 40) == 85
    assert seconds(outcome(Trial("a", 1e-3, 0, 2, True, "", ""), 6.0, None), 4) == 12
    assert seed_seconds({"a": short}, ["a", "b"], 40) == 170
    assert seed_seconds({}, ["a", "b"], 40) == 0


@pytest.mark.parametrize(("minutes", "tuned", "scored"), [(10, 8, 2), (2, 3, 0), (60, 10, 4)])
def test_time_is_kept_for_one_scored_run_of_each_contestant(
    minutes: float,
    tuned: int,
    scored: int,
    base: str,
    rows: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Runs of 4 or 8 steps at 10 s each, by a clock of its own: a seed of the two contestants takes 160 s."""
    now = [0.0]
    done: list[Trial] = []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(run_module, "serving", lambda folder, base: None)
    monkeypatch.setattr(run_module, "write", lambda found, folder, console: folder / "report.html")

    def clocked(trials: Sequence[Trial], late: Late) -> Iterator[Outcome]:
        for trial in trials:
            if late():
                return
            now[0] += 10.0 * trial.steps
            done.append(trial)
            yield outcome(trial, 10.0 * trial.steps, 10.0)

    settings = {
        "base.path": base,
        "data.train": rows,
        "compare.methods": [{"name": "lora", "r": 2}, {"name": "bitfit", "create": True}],
        "compare.rates": "0.001,0.01,0.1",
        "compare.rungs": "0.5,1",
        "compare.seeds": 2,
        "compare.minutes": minutes,
        "run.max_steps": 8,
        "run.output": str(tmp_path / "out"),
    }
    said = io.StringIO()
    compare(read_plan(None, settings), workers=clocked, console=Console(file=said, width=400))
    text = said.getvalue()
    assert "at most 10 tuning runs and 4 scored runs, 88 steps in all" in text
    assert "the whole plan takes about 15 min, and each of its seeds 3 min" in text
    assert ("more than --minutes 2" in text) == (minutes == 2)
    assert sum(trial.tuning for trial in done) == tuned
    assert sum(not trial.tuning for trial in done) == scored
