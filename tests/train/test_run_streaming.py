"""`--streaming`, from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command import train

STREAMED = ("--streaming", "--buffer_size", 10, "--max_length", 128)


def weights(run: Path) -> bytes:
    return (run / "adapter" / "adapter.safetensors").read_bytes()


@pytest.mark.parametrize("more", [("--packing",), ("--gradient_accumulation_steps", 2)])
def test_a_resumed_run_equals_an_uninterrupted_one(
    more: tuple[Any, ...], base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "out"
    settings = (*STREAMED, *more, "--save_steps", 2, "--save_total_limit", 9, "--max_steps", 4)
    assert train(base, rows, run, *settings) == 0
    out = capsys.readouterr().out
    assert "streamed: these are the first 76 rows" in " ".join(out.split())
    assert " rows read so far" in out
    whole = weights(run), (run / "checkpoint-4" / "progress.json").read_bytes()
    shutil.rmtree(run / "checkpoint-4")
    shutil.rmtree(run / "adapter")
    assert train(base, rows, run, *settings) == 0
    assert "resuming from" in capsys.readouterr().out
    assert (weights(run), (run / "checkpoint-4" / "progress.json").read_bytes()) == whole


def test_a_run_goes_on_with_more_steps_and_without_bad_rows(
    base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bad row is met in the second call; the third one leaves it out."""
    run, file, valid = tmp_path / "out", tmp_path / "rows.jsonl", tmp_path / "valid.jsonl"
    good = json.dumps({"prompt": "a", "completion": "b"})
    file.write_text("\n".join([good] * 1200 + ["{}"]) + "\n")
    valid.write_text(good)
    settings = ("--streaming", "--buffer_size", 8, "--batch_size", 100, "--data.valid", valid)
    assert train(base, str(file), run, *settings, "--max_steps", 1) == 0
    capsys.readouterr()
    assert train(base, str(file), run, *settings, "--max_steps", 13) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "rows.jsonl:1201: " in error
    assert "without such rows: --data.bad_rows drop" in error
    assert train(base, str(file), run, *settings, "--max_steps", 13, "--data.bad_rows", "drop") == 0
    assert "1 row cannot be trained on, so they are left out: " in " ".join(capsys.readouterr().out.split())
    assert json.loads((run / "figures.json").read_text())["history"][-1]["step"] == 13


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (("--max_steps", -1), "run.max_steps must be set with data.streaming"),
        (("--group_by_length",), "run.group_by_length needs the lengths of all rows"),
        (("--data.cache", "cache"), "data.cache: the rows of data.streaming are encoded as they are used"),
        (("--data.train", "-"), "standard input cannot be read again"),
        (("--method", "mixture", "--method.router", "task_logits"), "has to know the tasks of all rows"),
        (("--objective", "dpo"), "data.streaming: the objective dpo does not support it"),
        (("--data.streaming", "False", "--buffer_size", 5), "data.buffer has no effect without data.streaming"),
    ],
)
def test_what_cannot_go_with_it_is_refused(
    settings: tuple[Any, ...], told: str, base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(base, rows, tmp_path / "out", "--streaming", *settings) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_several_sources_need_their_shares(
    base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(base, f"{rows},{rows}", tmp_path / "out", "--streaming") == 2
    assert "data.weights must be set with data.streaming and several sources" in " ".join(
        capsys.readouterr().err.split()
    )
    assert train(base, f"{rows},{rows}", tmp_path / "out", "--streaming", "--data.weights", "0.5,0.5") == 0
