"""The progress of training: lines when piped, a dashboard on a terminal, JSON for machines."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from command import reparam, train
from forks import on_terminal
from hearing import Heard
from rich.console import Console

from reparam.core.progress import listening
from reparam.train.config import resolve
from reparam.train.live import BLOCKS, duration, sparkline
from reparam.train.run import train as run
from reparam.train.show import Show


def lines(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_json_is_all_that_is_printed(base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(base, rows, tmp_path / "out", "--json", "--logging_steps", 3, "--eval_steps", 3) == 0
    found = lines(capsys.readouterr().out)
    history = json.loads((tmp_path / "out" / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    for event, key, name in (("progress", "loss", "loss"), ("evaluation", "eval_loss", "held_out_loss")):
        shown = [(line["step"], line[name]) for line in found if line["event"] == event]
        assert shown == [(entry["step"], entry[key]) for entry in history if key in entry]
    progress = [line for line in found if line["event"] == "progress"]
    assert all(line["steps"] == 6 and line["tokens_per_second"] > 0 for line in progress)
    assert all(line["memory_bytes"] > 2**20 for line in progress)
    assert progress[-1]["seconds_left"] == 0
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    [job] = [line for line in found if line["event"] == "job"]
    assert (job["method"], job["trained_parameters"]) == ("lora", figures["trained parameters"])
    result = found[-1]
    assert (result["event"], result["before"], result["after"]) == ("result", figures["before"], figures["after"])
    assert result["adapter"] == str(tmp_path / "out" / "adapter")
    assert len(result["answers"]) == 3
    assert all(answer.keys() >= {"given", "given_without_adapter", "right"} for answer in result["answers"])
    assert train(base, rows, tmp_path / "out", "--json") == 0
    again = lines(capsys.readouterr().out)
    [resume] = [line for line in again if line["event"] == "resume"]
    assert resume["checkpoint"] == str(tmp_path / "out" / "checkpoint-6")


def test_json_has_the_samples_and_the_best_step(
    base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--run.samples", 2, "--run.metric", "exact_match", "--run.best", "--eval_steps", 3, "--run.eval_rows", 2)
    assert train(base, rows, tmp_path / "out", "--json", *more) == 0
    found = lines(capsys.readouterr().out)
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    stored = [sample for entry in figures["history"] for sample in entry.get("samples", [])]
    samples = [line for line in found if line["event"] == "sample"]
    assert [{key: line[key] for key in stored[0]} for line in samples] == stored
    assert len(samples) == 4
    assert [line["event"] for line in found].count("evaluation") == 2
    [best] = [line for line in found if line["event"] == "best"]
    assert (best["step"], best["metric"]) == (figures["best step"], "exact_match")
    assert all("exact_match" in line for line in found if line["event"] == "evaluation")


def test_json_of_a_dry_run_and_of_a_mistake(
    base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(base, rows, tmp_path / "out", "--json", "--dry-run") == 0
    plan = lines(capsys.readouterr().out)[-1]
    assert (plan["event"], plan["steps"], plan["configuration"]["run"]["max_steps"]) == ("plan", 6, 6)
    assert reparam("train", "--json", "--base", base) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "data.train must be set" in told.err


def test_piped_there_is_one_line_for_each_loss(
    base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(base, rows, tmp_path / "out", "--logging_steps", 3, "--eval_steps", 6) == 0
    told = capsys.readouterr().out
    assert len(re.findall(r"^step \d/6  loss \d+\.\d{4}  [\d,]+ tokens/s  \d+ s left$", told, re.MULTILINE)) >= 2
    assert re.search(r"^step 6/6  held-out loss \d+\.\d{4}$", told, re.MULTILINE)
    assert not set(told) & set(BLOCKS)
    assert "\x1b" not in told


def test_on_a_terminal_there_is_a_dashboard(base: str, rows: str, tmp_path: Path) -> None:
    settings = ["--logging_steps", 1, "--data.score_rows", 0]
    shown = on_terminal(lambda: train(base, rows, tmp_path / "out", *settings))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    last = text[text.rindex("training ") :]
    assert "6/6" in last
    assert re.search(r"loss +\d+\.\d{4} +[▁▂▃▄▅▆▇█]{6}\s", last)
    assert re.search(r"held out +\d+\.\d{4} +[▁▂▃▄▅▆▇█]+", last)
    assert re.search(r"[\d,]+ tokens/s   memory [\d,]+ MiB   learning rate \d\.\d\de[-+]\d\d", last)
    assert "step 6/6" not in text


def test_a_run_that_prints_nothing_is_a_wait_of_its_command(base: str, rows: str, tmp_path: Path) -> None:
    settings = {"base.path": base, "data.train": rows, "run.output": str(tmp_path / "out"), "run.max_steps": 2}
    with listening(heard := Heard()):
        run(resolve(None, {**settings, "data.score_rows": 0}), show=Show(Console(quiet=True)))
    assert heard.waits["training"] == (2, 2)
    assert "identifying the base" in heard.waits


def test_a_sparkline_spans_its_values() -> None:
    assert sparkline([]) == ""
    assert sparkline([2.0]) == sparkline([2.0, 2.0])[0] == BLOCKS[0]
    assert sparkline(range(8)) == BLOCKS  # type: ignore[arg-type]
    assert sparkline([5, float("nan"), 1]) == "█?▁"
    long = sparkline([float(i) for i in range(1000)])
    assert len(long) <= 48
    assert (long[0], long[-1]) == (BLOCKS[0], BLOCKS[-1])


def test_durations() -> None:
    assert [duration(value) for value in (0, 0.2, 59, 60.5, 3600)] == ["0 s", "1 s", "59 s", "1 min 1 s", "1 h 0 min"]
