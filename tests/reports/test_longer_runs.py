"""A finished run goes on to more steps, at the rates of its new schedule, and says what it does."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from command import train
from safetensors.torch import load_file

RATE = 0.05  # of `train`, whose runs have 6 steps


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter.safetensors")


def history(out: Path) -> list[dict[str, float]]:
    found = json.loads((out / "figures.json").read_text())["history"]
    return [entry for entry in found if "learning_rate" in entry]


def test_at_a_constant_rate_the_longer_run_is_the_run_of_that_length(
    base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    constant = ["--lr_scheduler_type", "constant", "--warmup_steps", 0, "--eval_steps", 3, "--save_steps", 3]
    longer, whole = tmp_path / "longer", tmp_path / "whole"
    assert train(base, rows, longer, *constant) == 0
    assert train(base, rows, longer, *constant, "--max_steps", 9) == 0
    assert "the run had 6 steps and goes on from step 6 to step 9" in " ".join(capsys.readouterr().out.split())
    assert train(base, rows, whole, *constant, "--max_steps", 9) == 0
    a, b = adapter(longer), adapter(whole)
    assert all(torch.equal(a[key], b[key]) for key in b)
    assert [entry["loss"] for entry in history(longer)] == [entry["loss"] for entry in history(whole)]
    assert json.loads((longer / "run.json").read_text())["earlier numbers of steps"] == [6]


def test_the_rates_are_those_of_the_new_number_of_steps(
    base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    more = ["--logging_steps", 1, "--warmup_steps", 0]
    assert train(base, rows, out, *more) == 0
    assert train(base, rows, out, *more, "--max_steps", 12) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "goes on from step 6 to step 12, at the rates of the cosine schedule of 12 steps" in said
    for entry in history(out):
        steps = 6 if entry["step"] <= 6 else 12
        rate = RATE * (1 + math.cos(math.pi * (entry["step"] - 1) / steps)) / 2
        assert entry["learning_rate"] == pytest.approx(rate, rel=1e-12), entry["step"]
    trained = adapter(out)
    assert train(base, rows, out, *more, "--max_steps", 12) == 0
    assert "the run is finished (12 of 12 steps), so nothing is trained" in " ".join(capsys.readouterr().out.split())
    assert all(torch.equal(value, trained[key]) for key, value in adapter(out).items())
    assert train(base, rows, out, *more, "--max_steps", 11) == 2
    assert "a run cannot have fewer steps than before" in " ".join(capsys.readouterr().err.split())


def test_a_method_with_a_schedule_keeps_its_number_of_steps(
    base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adalora = ["--method", "adalora", "--method.tinit", 1, "--method.tfinal", 2]
    assert train(base, rows, tmp_path / "out", *adalora) == 0
    before = (tmp_path / "out" / "run.json").read_bytes()
    assert train(base, rows, tmp_path / "out", *adalora, "--max_steps", 9) == 2
    assert "the method has a schedule for its number of steps" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "out" / "run.json").read_bytes() == before
