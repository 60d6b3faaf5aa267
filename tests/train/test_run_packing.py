"""`--packing`, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import reparam, train


def test_a_packed_run(base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--packing", "--max_length", 128, "--max_steps", -1, "--epochs", 2)
    assert train(base, rows, tmp_path / "out", *more) == 0
    out = capsys.readouterr().out
    assert "packed          76 examples in 15 packs of up to 128 tokens, 94% full" in out
    record = json.loads((tmp_path / "out" / "run.json").read_text())["identity"]
    assert record["number of steps"] == 8  # two epochs of four batches of up to four packs
    assert json.loads((tmp_path / "out" / "figures.json").read_text())["history"][-1]["epoch"] == 2
    assert train(base, rows, tmp_path / "out", "--max_length", 128, "--max_steps", -1, "--epochs", 2) == 2
    assert "data.packing was True and is now False" in " ".join(capsys.readouterr().err.split())


def test_a_row_with_a_loss_that_is_not_finite_is_named(
    base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rate so large that the second step diverges; the message names all rows of its packs."""
    assert train(base, rows, tmp_path / "out", "--packing", "--learning_rate", 1e30, "--max_steps", 3) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "the loss is nan at step" in error
    assert error.count("rows.jsonl:") > 8  # more rows than packs


def test_virtual_tokens_are_refused(base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(base, rows, tmp_path / "out", "--packing", "--method", "prompt") == 2
    assert "data.packing cannot be used here: " in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_rows_with_tasks_are_packed(base: str, tmp_path: Path) -> None:
    lines = [{"prompt": f"def f{i}(a, b):", "completion": " two", "task": "ab"[i % 2]} for i in range(40)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = ("--packing", "--max_length", 64, "--max_steps", 2, "--eval_steps", 2, "--data.score_rows", 0)
    assert train(base, str(rows), tmp_path / "out", "--method", "task_gated", "--method.n", 4, *more) == 0
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert figures["after"][0]["value"] < figures["before"][0]["value"]


def test_the_flag_can_have_a_value_as_in_trl(
    base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(base, rows, tmp_path / "no", "--packing", "False", "--max_length", 128) == 0
    assert "packed  " not in capsys.readouterr().out
    assert train(base, rows, tmp_path / "yes", "--packing", "True", "--max_length", 128) == 0
    assert "packed  " in capsys.readouterr().out
    assert reparam("train", "--run.best", "maybe") == 2
    assert "maybe" in capsys.readouterr().err
