"""The loggers get the name, the settings and the losses of a run; one that cannot start is named in one sentence.

Those that are not installed are skipped.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reparam.cli.screen import console, waits
from reparam.evaluation.terminal import say

SETTINGS = {"method.r": "8", "run.max_steps": "6", "learning_rate": "0.05"}


def losses(folder: Path, key: str) -> list[tuple[int, float]]:
    state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())
    return [(entry["step"], pytest.approx(entry[key])) for entry in state["log_history"] if key in entry]


def test_wandb(base: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for name in ("first", "second"):  # the second run is one of its own
        assert train(base, rows, tmp_path / name, "--report_to", "wandb", "--run_name", name) == 0
        assert wandb.run is None
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    for name, file in zip(("first", "second"), files, strict=True):
        records = list(records_of_wandb(file))
        assert [record.run.display_name for record in records if record.HasField("run")] == [name]
        config = {item.key: item.value_json.strip('"') for record in records for item in record.config.update}
        assert {key: config[key] for key in SETTINGS} == SETTINGS
        history = [{item.key or item.nested_key[0]: item.value_json for item in r.history.item} for r in records]
        for key, ours in (("train/loss", "loss"), ("eval/loss", "eval_loss")):
            found = [(int(item["train/global_step"]), float(item[key])) for item in history if key in item]
            assert found == losses(tmp_path / name, ours)
        assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0]


def records_of_wandb(file: Path) -> Iterator[Any]:
    """The records of an offline run: protocol buffers in a log of LevelDB's format."""
    from wandb.proto import wandb_internal_pb2

    raw, at, parts, block = file.read_bytes(), 7, b"", 32768
    while at + 7 <= len(raw):
        size, kind = struct.unpack("<HB", raw[at + 4 : at + 7])
        if block - at % block < 7 or kind == 0:
            at += block - at % block
            continue
        parts += raw[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def test_mlflow(base: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'store.db'}")
    monkeypatch.chdir(tmp_path)
    assert train(base, rows, tmp_path / "out", "--report_to", "mlflow", "--run_name", "first") == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "store.db")) as store:
        assert store.execute("SELECT name, status FROM runs").fetchall() == [("first", "FINISHED")]
        settings = dict(store.execute("SELECT key, value FROM params").fetchall())
        assert {key: settings[key] for key in SETTINGS} == SETTINGS
        for key in ("loss", "eval_loss"):
            found = store.execute("SELECT step, value FROM metrics WHERE key = ? ORDER BY step", (key,)).fetchall()
            assert found == losses(tmp_path / "out", key)


def test_trackio(base: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    import trackio.utils

    for module in (trackio.utils, pytest.importorskip("trackio.sqlite_storage")):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "store")
    assert train(base, rows, tmp_path / "out", "--report_to", "trackio", "--run_name", "first") == 0
    (file,) = (tmp_path / "store").glob("*.db")
    with contextlib.closing(sqlite3.connect(file)) as store:
        ((name, settings),) = store.execute("SELECT run_name, config FROM configs").fetchall()
        assert name == "first"
        assert {key: str(json.loads(settings)[key]) for key in SETTINGS} == SETTINGS
        logged = [json.loads(text) for (text,) in store.execute("SELECT metrics FROM metrics ORDER BY id").fetchall()]
    for key, ours in (("train/loss", "loss"), ("eval/loss", "eval_loss")):
        found = [(entry["train/global_step"], entry[key]) for entry in logged if key in entry]
        assert found == losses(tmp_path / "out", ours)


def test_a_logger_that_cannot_start_is_named(
    base: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "gopher://nowhere")
    assert train(base, rows, tmp_path / "out", "--report_to", "mlflow") == 2
    told = capsys.readouterr()
    assert "error: run.loggers: mlflow cannot start: " in told.err
    assert "gopher://nowhere" in told.err
    assert "Traceback" not in told.err
    assert "scoring" not in told.out


def test_tensorboard_gets_the_losses_of_a_mixture_and_the_settings(
    base: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    mixture = ("--method", "llava_mole", "--method.n", 2, "--method.r", 2)
    assert train(base, rows, tmp_path / "out", "--report_to", "tensorboard", *mixture) == 0
    events = EventAccumulator(str(tmp_path / "out" / "runs" / "out")).Reload()
    (name,) = [tag for tag in events.Tags()["scalars"] if tag.startswith("train/loss_")]
    found = [(event.step, event.value) for event in events.Scalars(name)]
    assert found == losses(tmp_path / "out", name.removeprefix("train/"))
    (told,) = [event.tensor_proto.string_val[0] for event in events.Tensors("args/text_summary")]
    assert json.loads(told)["method.n"] == 2


def test_what_libraries_print_is_not_among_lines_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    with waits("train", {"json": True}):
        print("a library")
        say(console, "{}")
    assert capsys.readouterr() == ("{}\n", "a library\n")
    say(console, "after")
    assert capsys.readouterr().out == "after\n"
