"""The Trainer under signals, in this process, in one of its own, and in two that train together."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forked
from small_trainer import At, history, same, send, tiny, trainer, weights
from two_processes import two_processes

from reparam.errors import RunLocked
from reparam.train.checkpoint import RunLock, newest, verify
from reparam.train.trainer import Trainer

# ---- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step(tmp_path, number):
    before = signal.getsignal(number)
    run = trainer(tmp_path, callbacks=[At(3, send(number, signal.SIGTERM))])
    run.train()
    assert run.state.global_step == 3
    assert verify(tmp_path / "checkpoint-3") == []
    assert signal.getsignal(number) == before


def test_a_second_interrupt_ends_it_at_once(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    run = trainer(tmp_path, save_steps=2, callbacks=[At(4, send(signal.SIGINT, signal.SIGINT))])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run.interrupted == signal.SIGINT
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoint-2"]
    assert signal.getsignal(signal.SIGINT) == before
    with RunLock(tmp_path):
        pass


def terminated_and_killed(folder: Path) -> None:
    """Train until a signal comes during step 2; then train another run, and block in the middle of its second save."""

    def tell() -> None:
        print("training", flush=True)
        while run.interrupted is None:
            time.sleep(0.01)

    def block(staged: Path) -> None:
        if run.state.global_step == 4:
            print("saving", flush=True)
            time.sleep(60)

    run = trainer(folder / "terminated", callbacks=[At(2, tell)])
    run.train()
    print(run.interrupted.name, flush=True)
    run = trainer(folder / "killed", save_steps=2, write=block)
    run.train()


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The folders of a run that was terminated and of one that was killed while saving, in a process of their own."""
    folder = tmp_path_factory.mktemp("ended")
    process = Forked(lambda: terminated_and_killed(folder))
    try:
        process.until("training")
        process.kill(signal.SIGTERM)
        process.until("SIGTERM")
        process.until("saving")
        with pytest.raises(RunLocked, match=f"process {process.pid} "):
            trainer(folder / "killed").train(resume_from_checkpoint=True)
    finally:
        process.kill()
        process.end()
    return folder


def test_a_run_killed_in_the_middle_of_a_save_goes_on_from_the_one_before(ended, tmp_path):
    assert len(list((ended / "killed").glob(".checkpoint-4.*"))) == 1
    assert [path.name for path in (ended / "killed").glob("checkpoint-*")] == ["checkpoint-2"]
    straight = trainer(tmp_path / "straight", save_steps=2)
    straight.train()
    second = trainer(ended / "killed", model=tiny(seed=7), save_steps=2)
    second.train(resume_from_checkpoint=True)
    assert same(weights(straight.model), weights(second.model))
    assert history(straight.state) == history(second.state)
    assert list((ended / "killed").glob(".checkpoint-*")) == []


def test_a_terminated_run_leaves_a_checkpoint(ended):
    found = newest(ended / "terminated")
    assert found.path.name == "checkpoint-2"
    assert found.skipped == []


# ---- several processes


def stop_and_go_on(folder: Path) -> None:
    """The work of each process."""
    second = os.environ["RANK"] == "1"

    def ranked(name: str, **settings: Any) -> Trainer:
        made = trainer(folder / name, max_steps=4, **settings)
        torch.manual_seed(second)  # so that each process drops out other units
        return made

    straight = ranked("straight")
    straight.train()
    first = ranked("run", callbacks=[At(2, send(signal.SIGTERM))] if second else [])  # one of them gets the signal
    first.train()
    assert (first.interrupted, first.state.global_step) == (signal.SIGTERM, 2)
    again = trainer(folder / "run", model=tiny(seed=7), max_steps=4)
    again.train(resume_from_checkpoint=True)
    assert again.args.world_size == 2
    assert same(weights(straight.model), weights(again.model))
    assert history(straight.state) == history(again.state)


def test_two_processes_stop_together_and_go_on(tmp_path):
    for code, _, errors in two_processes(lambda: stop_and_go_on(tmp_path), tmp_path / "log"):
        assert code == 0, errors
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    rng = json.loads((tmp_path / "run" / "checkpoint-4" / "rng.json").read_text())
    assert len(rng["tree"]) == 2
