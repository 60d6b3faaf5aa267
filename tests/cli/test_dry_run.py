"""`--dry-run` shows the run and writes nothing; loggers get the run's name, or one sentence says what they need."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from command import reparam, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reparam.train.config import resolve


def test_it_shows_the_run_and_writes_nothing(
    base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert train(base, rows, out, "--dry-run", "--lora_r", 3, "--lora_target", "q_proj", "v_proj") == 0
    told = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    text = "\n".join(line[4:] for line in told.splitlines() if line.startswith("    "))
    overrides = {"base.path": base, "data.train": rows, "run.output": str(out), "method.r": 3, "run.max_steps": 6}
    overrides |= {"adapter.targets": "q_proj,v_proj", "run.batch_size": 4, "optim.learning_rate": 0.05}
    (tmp_path / "shown.toml").write_text(text)
    assert resolve(tmp_path / "shown.toml", {}) == resolve(None, {**overrides, "data.score_rows": 3})
    for part in (
        "parameters will be trained",
        "q_proj",
        "training rows",
        "6 steps of 4 rows",
        f"nothing was written to {out}",
    ):
        assert part in told


def test_it_says_where_a_run_goes_on_and_changes_nothing(
    base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(base, rows, tmp_path / "out", "--save_steps", 3) == 0
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    assert train(base, rows, tmp_path / "out", "--dry-run", "--max_steps", 9) == 0
    assert f"resuming from {tmp_path / 'out' / 'checkpoint-6'}" in capsys.readouterr().out
    assert train(base, rows, tmp_path / "out", "--dry-run", "--run.fresh") == 0
    assert "resuming" not in capsys.readouterr().out
    assert train(base, rows, tmp_path / "out", "--dry-run", "--lora_r", 2) == 2
    assert "method.r was 8 and is now 2" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")} == before


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        (["--lr_scheduler_type", "cosin"], "optim.schedule: 'cosin' is unknown"),
        (["--lora_target", "nowhere"], "nowhere"),
        (["--method", "adalora", "--method.tinit", "5", "--method.tfinal", "5"], "6 steps"),
        (["--report_to", "clearml"], "run.loggers: clearml needs the package clearml: run  pip install clearml"),
        (["--report_to", "tensorbord"], "run.loggers: 'tensorbord' is unknown (did you mean 'tensorboard'"),
        (["--report_to", "none,tensorboard"], "run.loggers: 'none' is unknown"),
    ],
)
def test_it_meets_the_mistakes_that_a_run_would_meet(
    typed: list[str], sentence: str, base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(base, rows, tmp_path / "out", "--dry-run", *typed) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_told_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert reparam("train", "--dry-run", "--base", "model") == 2
    assert "data.train must be set, as an option (--data.train ...)" in capsys.readouterr().err


@pytest.mark.parametrize(("named", "folder"), [([], "out"), (["--run_name", "a/b: first"], "a-b-first")])
def test_tensorboard_has_the_losses_under_the_name_of_the_run(
    named: list[str], folder: str, base: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    out = tmp_path / "out"
    assert train(base, rows, out, "--report_to", "tensorboard", *named) == 0
    assert [entry.name for entry in (out / "runs").iterdir()] == [folder]
    events = EventAccumulator(str(out / "runs" / folder)).Reload()
    state = json.loads((out / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    for tag, key in (("train/loss", "loss"), ("eval/loss", "eval_loss")):
        want = [(entry["step"], pytest.approx(entry[key], rel=1e-6)) for entry in state if key in entry]
        assert [(event.step, event.value) for event in events.Scalars(tag)] == want
    assert tomllib.loads((out / "config.toml").read_text())["run"].get("name") == (named[1] if named else None)
    assert train(base, rows, out, "--report_to", "tensorboard", "--fresh", "--run_name", "again") == 0
    assert [entry.name for entry in (out / "runs").iterdir()] == ["again"]
