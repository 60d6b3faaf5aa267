"""The Trainer under signals, in this process, in a child process, and in two that train together."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_trainer import At, history, same, send, tiny, trainer, weights

from reparam.errors import RunLocked
from reparam.train.checkpoint import RunLock, newest, verify

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


HELPERS = str(Path(__file__).parents[1] / "helpers")
CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import small_trainer as t

class Tell(t.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            print("training", flush=True)
            time.sleep(2)

def block(staged):  # in the middle of the second save
    if run.state.global_step == 4:
        print("saving", flush=True)
        time.sleep(60)

run = t.trainer(Path(sys.argv[2]) / "terminated", callbacks=[Tell()])
run.train()
print(run.interrupted.name, flush=True)
run = t.trainer(Path(sys.argv[2]) / "killed", save_steps=2, write=block)
run.train()
"""


def wait_for(process: "subprocess.Popen[str]", word: str) -> None:
    for line in process.stdout:
        if line.strip() == word:
            return
    pytest.fail(process.stderr.read())


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The folders of a run that was terminated and of one that was killed while saving, in child processes."""
    folder = tmp_path_factory.mktemp("ended")
    command = [sys.executable, "-c", CHILD, HELPERS, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(process, "training")
        process.terminate()
        wait_for(process, "SIGTERM")
        wait_for(process, "saving")
        with pytest.raises(RunLocked, match=f"process {process.pid} "):
            trainer(folder / "killed").train(resume_from_checkpoint=True)
    finally:
        process.kill()
        process.communicate()
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

RANKS = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import small_trainer as t

folder, second = Path(sys.argv[2]), os.environ["RANK"] == "1"
straight = t.trainer(folder / "straight", max_steps=4)
t.torch.manual_seed(second)  # so that each process drops out other units
straight.train()
stop = [t.At(2, t.send(t.signal.SIGTERM))] if second else []  # only one of them gets the signal
first = t.trainer(folder / "run", max_steps=4, callbacks=stop)
t.torch.manual_seed(second)
first.train()
assert (first.interrupted, first.state.global_step) == (t.signal.SIGTERM, 2)
again = t.trainer(folder / "run", model=t.tiny(seed=7), max_steps=4)
again.train(resume_from_checkpoint=True)
assert again.args.world_size == 2
assert t.same(t.weights(straight.model), t.weights(again.model))
assert t.history(straight.state) == t.history(again.state)
"""


def test_two_processes_stop_together_and_go_on(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    result = subprocess.run(
        [*command, HELPERS, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    rng = json.loads((tmp_path / "run" / "checkpoint-4" / "rng.json").read_text())
    assert len(rng["tree"]) == 2
