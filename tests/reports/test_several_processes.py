"""Training in two processes (gloo on CPUs): the result of one process, one writer, one voice, and nothing hangs."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from command import reparam, train
from safetensors.torch import load_file
from two_processes import two_processes

from reparam.train import model
from reparam.train.base import BaseConfig
from reparam.train.checkpoint import RunLock
from reparam.train.trainer import Trainer


@pytest.fixture(scope="module")
def few(rows: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """23 rows for training and one held out: with 8 rows in a step, the last step of an epoch has 7."""
    file = tmp_path_factory.mktemp("few") / "rows.jsonl"
    file.write_text("".join(Path(rows).read_text().splitlines(keepends=True)[:24]))
    return str(file)


def options(batch: int, *more: object) -> list[object]:
    return ["--max_steps", 3, "--batch_size", batch, "--learning_rate", 0.01, "--data.score_rows", 0, *more]


def test_two_processes_train_what_one_does_with_the_same_rows_in_a_step(base: str, few: str, tmp_path: Path) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    (code, out, _), (other, silent, errors) = two_processes(
        lambda: train(base, few, two, *options(4)), tmp_path / "log"
    )
    assert (code, other, silent, errors) == (0, 0, "", "")
    assert "bit for bit" in out
    assert train(base, few, one, *options(8)) == 0
    a, b = (load_file(folder / "adapter" / "adapter.safetensors") for folder in (two, one))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=2e-6)  # sums of gradients in another order
    assert max(float(value.abs().max()) for key, value in b.items() if key.endswith(".B")) > 1e-2
    names = [{path.name for path in folder.iterdir()} for folder in (two, one)]
    assert names[0] == names[1]
    losses = [json.loads((folder / "figures.json").read_text())["history"] for folder in (two, one)]
    assert [entry["step"] for entry in losses[0]] == [entry["step"] for entry in losses[1]]
    (code, _, err), (other, *_) = two_processes(lambda: train(base, few, one, *options(8)), tmp_path / "log")
    assert (code, other) == (2, 1)
    assert "number of processes was 1 and is now 2" in " ".join(err.split())


def test_a_resumed_run_of_two_processes_is_the_uninterrupted_one(
    base: str, few: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of the second epoch, by a signal to one process; with dropout."""
    more = ["--max_steps", 7, "--save_steps", 2, "--logging_steps", 1, "--lora_dropout", 0.2]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert [code for code, *_ in two_processes(lambda: train(base, few, whole, *options(4, *more)), tmp_path)] == [0, 0]

    loss = Trainer.compute_loss

    def ending(trainer: Trainer, *args: object, **kwargs: object) -> object:
        if trainer.state.global_step == 4 and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(trainer, *args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "compute_loss", ending)
        ended = two_processes(lambda: train(base, few, stopped, *options(4, *more)), tmp_path)
    assert [code for code, *_ in ended] == [143, 143]
    assert not (stopped / "adapter").exists()
    (code, out, err), (other, *_) = two_processes(lambda: train(base, few, stopped, *options(4, *more)), tmp_path)
    assert (code, other) == (0, 0), err
    assert "checkpoint-5" in out
    found, wanted = (load_file(folder / "adapter" / "adapter.safetensors") for folder in (stopped, whole))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    figures = [json.loads((folder / "figures.json").read_text())["history"] for folder in (stopped, whole)]
    losses = [{entry["step"]: entry["loss"] for entry in history if "loss" in entry} for history in figures]
    assert losses[0] == losses[1]
    assert len(losses[1]) == 7


def test_an_error_is_told_once_and_ends_both(base: str, few: str, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    cases = {
        "no such file": lambda: train(base, "missing.jsonl", tmp_path / "out", *options(4)),
        "run.batch_size: 0": lambda: train(base, few, tmp_path / "out", *options(0)),
        "No such option": lambda: train(base, few, tmp_path / "out", "--batch", 3),
        "is in use by": lambda: train(base, few, locked, *options(4)),
        "without torchrun": lambda: reparam("generate", "x", "-b", base),
    }
    with RunLock(locked):
        for said, act in cases.items():
            (code, out, err), (other, *silent) = two_processes(act, tmp_path / "log")
            assert said in " ".join((out + err).split()), (said, out, err)
            assert (code, other in (1, 2), silent) == (2, True, ["", ""]), said
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_in_one_process_ends_both(
    base: str, few: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = Trainer.compute_loss

    def poisoned(trainer: Trainer, *args: object, **more: object) -> object:
        found = loss(trainer, *args, **more)  # type: ignore[arg-type]
        spoiled = os.environ["RANK"] == "1" and trainer.state.global_step == 1 and isinstance(found, torch.Tensor)
        return found * float("nan") if spoiled else found

    monkeypatch.setattr(Trainer, "compute_loss", poisoned)
    act = lambda: train(base, few, tmp_path / "out", *options(4))  # noqa: E731
    (code, _, err), (other, *silent) = two_processes(act, tmp_path / "log")
    assert (code, other, silent) == (1, 1, ["", ""])
    assert "the gradient is nan at step 2, in the rows" in " ".join(err.split())
    assert err.count("rows.jsonl:") == 8  # those of both processes


def test_an_error_in_one_process_ends_both(
    base: str, few: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = model.loaded

    def loaded(described: BaseConfig, head: object = None) -> object:
        if os.environ["RANK"] == "1":
            raise MemoryError("no room")
        return plain(described, head)  # type: ignore[arg-type]

    monkeypatch.setattr("reparam.train.run.loaded", loaded)
    act = lambda: train(base, few, tmp_path / "out", *options(4))  # noqa: E731
    (code, _, err), (other, *silent) = two_processes(act, tmp_path / "log")
    assert (code, other, silent) == (1, 1, ["", ""])
    assert "process 1 of 2: no room" in " ".join(err.split())
