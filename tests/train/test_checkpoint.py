"""The commit protocol of checkpoints, and their training state."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from reparam.errors import DiskFull, RunLocked
from reparam.train.checkpoint import RunLock, commit, newest, prune, verify


def save(run: Path, step: int, size: int = 8) -> Path:
    """Commit a checkpoint with two files, one of them in a folder."""

    def write(folder: Path) -> None:
        (folder / "weights").write_bytes(bytes([step % 256]) * size)
        (folder / "sub").mkdir()
        (folder / "sub" / "state.json").write_text("{}")

    return commit(run, step, write)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


# ---- commit, verify, newest


def test_a_committed_checkpoint_is_intact_and_found(tmp_path):
    path = save(tmp_path, 10)
    assert path == tmp_path / "checkpoint-10"
    assert verify(path) == []
    assert newest(tmp_path).path == path
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 10
    assert set(manifest["files"]) == {"weights", "sub/state.json"}


def test_steps_are_compared_as_numbers(tmp_path):
    for step in (9, 100, 20):
        save(tmp_path, step)
    assert newest(tmp_path).path == tmp_path / "checkpoint-100"


def test_no_folder_and_no_checkpoint(tmp_path):
    assert newest(tmp_path / "none").path is None
    (tmp_path / "checkpoint-best").mkdir()
    assert newest(tmp_path) == newest(tmp_path / "none")


def test_a_step_is_saved_again(tmp_path):
    path = save(tmp_path, 5)
    (path / "stray").write_text("left over")
    save(tmp_path, 5, size=16)
    assert sorted(os.listdir(path)) == ["manifest.json", "sub", "weights"]
    assert verify(path) == []
    assert names(tmp_path) == ["checkpoint-5"]


def damage_truncate(path: Path) -> str:
    os.truncate(path / "weights", 3)
    return "weights has 3 bytes instead of 8"


def damage_edit(path: Path) -> str:
    (path / "weights").write_bytes(b"12345678")
    return r"weights was changed after it was saved \(its SHA-256 differs\)"


def damage_remove(path: Path) -> str:
    (path / "sub" / "state.json").unlink()
    return "sub/state.json is missing"


def damage_uncommit(path: Path) -> str:
    (path / "manifest.json").unlink()
    return "manifest.json is missing: the checkpoint was not completed"


def damage_cut_manifest(path: Path) -> str:
    os.truncate(path / "manifest.json", 20)
    return r".*manifest.json: not valid JSON: .*"


def damage_shape_of_manifest(path: Path) -> str:
    (path / "manifest.json").write_text("[1, 2]")
    return r".*manifest.json: expected a JSON object, found list"


def damage_format(path: Path) -> str:
    (path / "manifest.json").write_text('{"format": 7, "step": 20, "files": {}}')
    return "manifest.json has format 7, but this version reads only 1"


def damage_escape(path: Path) -> str:
    entry = {"size": 1, "sha256": ""}
    (path / "manifest.json").write_text(json.dumps({"format": 1, "step": 20, "files": {"../x": entry}}))
    return r"manifest.json has a bad entry for '../x' \(.*leads out of the folder.*\)"


def damage_rename(path: Path) -> str:
    other = path.with_name("checkpoint-10")
    (other / "manifest.json").write_bytes((path / "manifest.json").read_bytes())
    os.rename(other, path.with_name("checkpoint-30"))
    return "manifest.json belongs to step 20; weights was changed.*"


DAMAGES = [value for name, value in globals().items() if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_a_damaged_checkpoint_is_skipped_with_its_reason(tmp_path, damage):
    older = save(tmp_path, 5)
    save(tmp_path, 10)
    damaged = save(tmp_path, 20)
    reason = damage(damaged)
    found = newest(tmp_path)
    if damage is damage_rename:  # 20 is intact, what is called 30 is not
        assert found.path == damaged
        damaged = tmp_path / "checkpoint-30"
    else:
        assert found.path == tmp_path / "checkpoint-10"
    assert [path for path, _ in found.skipped] == [damaged]
    assert re.fullmatch(reason, found.skipped[0][1])
    assert verify(older) == []


def test_everything_damaged(tmp_path):
    for step in (1, 2):
        damage_edit(save(tmp_path, step))
    found = newest(tmp_path)
    assert found.path is None
    assert [path.name for path, _ in found.skipped] == ["checkpoint-2", "checkpoint-1"]


def test_an_error_while_saving_leaves_the_older_one(tmp_path):
    save(tmp_path, 1)

    def fails(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        commit(tmp_path, 2, fails)
    assert names(tmp_path) == ["checkpoint-1"]


@pytest.fixture
def small_files():
    """Limit each file to 64 KiB, which fails like a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_names_the_checkpoint_that_is_left(tmp_path, small_files):
    with pytest.raises(DiskFull, match="there is no older checkpoint"):
        save(tmp_path, 1, size=1 << 17)
    save(tmp_path, 2)
    with pytest.raises(DiskFull, match=r"checkpoint-3 .*File too large.*checkpoint-2 is intact") as caught:
        save(tmp_path, 3, size=1 << 17)
    assert isinstance(caught.value.__cause__.__cause__, OSError)
    assert caught.value.__cause__.__cause__.errno == errno.EFBIG
    assert names(tmp_path) == ["checkpoint-2"]
    assert verify(tmp_path / "checkpoint-2") == []


# ---- prune


def test_prune_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, step)
    assert sorted(path.name for path in prune(tmp_path, 2)) == ["checkpoint-1", "checkpoint-2"]
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-3"]


def test_prune_never_deletes_the_newest_good_one(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    damage_edit(tmp_path / "checkpoint-4")
    damage_truncate(tmp_path / "checkpoint-3")
    prune(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert newest(tmp_path).path == tmp_path / "checkpoint-2"


def test_prune_without_a_good_one_deletes_nothing(tmp_path):
    for step in (1, 2):
        damage_edit(save(tmp_path, step))
    assert prune(tmp_path, 1) == []
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_prune_spares_the_protected(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    prune(tmp_path, 1, protect=[tmp_path / "checkpoint-1"])
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3"]


# ---- the lock


HOLD = """
import os, sys, time
from reparam.train.checkpoint import RunLock
with RunLock(sys.argv[1]):
    worker = os.fork() if sys.argv[2] == "fork" else None
    if worker == 0:  # the worker itself says who it is: what happens at a fork in a child has happened then
        print(os.getpid(), flush=True)
    if worker is None:
        print(worker, flush=True)
    time.sleep(30)
"""


def hold(run: Path, how: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", textwrap.dedent(HOLD), str(run), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path):
    # A killed run's data loader workers, which were forked from it, must not keep the folder locked.
    process = hold(tmp_path, "fork")
    worker = int(process.stdout.readline())
    try:
        with pytest.raises(RunLocked, match=rf"is in use by process {process.pid} on "), RunLock(tmp_path):
            pass
        process.kill()
        process.wait()
        os.kill(worker, 0)  # still there
        with RunLock(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_lock_holds_within_one_process_and_can_be_entered_again(tmp_path):
    lock = RunLock(tmp_path / "run")
    with lock:
        with lock:
            pass
        with pytest.raises(RunLocked, match=f"process {os.getpid()} "), RunLock(tmp_path / "run"):
            pass
    with RunLock(tmp_path / "run"):
        pass


BLOCKED = """
import sys, time
from pathlib import Path
from reparam.train.checkpoint import RunLock, commit

def write(folder):
    (folder / "weights").write_bytes(bytes(1000))
    print("half", flush=True)
    time.sleep(30)

with RunLock(sys.argv[1]):
    commit(sys.argv[1], 2, write)
"""


def test_a_run_killed_in_the_middle_of_a_save(tmp_path):
    save(tmp_path, 1)
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "half\n", process.communicate()[1]
    process.kill()
    process.communicate()
    assert len(names(tmp_path)) == 3, "the half-written folder is gone before anybody could have cleared it"
    assert newest(tmp_path).path == tmp_path / "checkpoint-1"
    assert newest(tmp_path).skipped == []
    with RunLock(tmp_path):
        assert names(tmp_path) == [".lock", "checkpoint-1"]
