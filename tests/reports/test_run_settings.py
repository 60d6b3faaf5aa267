"""Settings of a run that make no sense are refused at once, by key; a run of one step trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import train

from reparam import ConfigError
from reparam.train.config import resolve
from reparam.train.sections import DataConfig

WRONG = {
    **dict.fromkeys(("run.batch_size", "run.accumulation", "run.keep", "run.log_every", "data.max_length"), (0, -1)),
    **dict.fromkeys(("run.epochs", "optim.learning_rate"), (0, -0.5, "nan", "inf")),
    **dict.fromkeys(("optim.weight_decay", "optim.max_grad_norm", "optim.warmup"), (-0.1, "nan")),
    **dict.fromkeys(("run.eval_every", "run.save_every", "data.score_rows"), (-1,)),
    "run.max_steps": (0, -2),
    "data.holdout": (0, 1, -0.1, "nan"),
}


@pytest.mark.parametrize("key", WRONG)
def test_a_value_out_of_range_is_named(key: str) -> None:
    for value in WRONG[key]:
        with pytest.raises(ConfigError, match=f"^{key}: .*expected"):
            resolve(None, {key: value})


def test_no_share_is_held_out_beside_a_file() -> None:
    assert DataConfig(valid="rows.jsonl", holdout=0.0).holdout == 0


def test_a_run_of_one_step_trains(base: str, rows: str, tmp_path: Path) -> None:
    assert train(base, rows, tmp_path / "out", "--max_steps", 1) == 0


def test_a_run_that_learned_nothing_leaves_no_adapter(base: str, rows: str, tmp_path: Path) -> None:
    assert train(base, rows, tmp_path / "out", "--learning_rate", "1e-30") == 1
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize(("rate", "worse"), [(0.05, False), (20, True)])
def test_a_diverged_run_says_so(
    rate: float, worse: bool, base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(base, rows, tmp_path / "out", "--learning_rate", rate, "--max_steps", 3) == 0
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert (figures["after"][0]["value"] > figures["before"][0]["value"]) == worse
    assert figures["worse than the base"] is worse
    out = capsys.readouterr().out
    assert ("the run diverged" in out) == worse
    assert (f"{figures['after'][0]['value']:.4f} with the adapter" in out) == worse
