"""Run folders from elsewhere: nothing is written through a link, and no file of them blocks or fills the memory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from command import train

from reparam.errors import StateError, WriteFailed
from reparam.io.outputs import check_continued, check_files
from reparam.train.checkpoint import RunLock, verify
from reparam.train.state import read_tree, write_tree

MINE = "mine"


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A file outside of the run folder."""
    file = tmp_path / "mine.txt"
    file.write_text(MINE)
    return file


@pytest.mark.parametrize("link", ["symbolic", "hard", "dangling", "pipe", "folder"])
def test_a_lock_is_not_written_through_a_link(link: str, mine: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lock = run / ".lock"
    if link == "hard":
        lock.hardlink_to(mine)
    elif link == "pipe":
        os.mkfifo(lock)
    elif link == "folder":
        lock.mkdir()
    else:
        lock.symlink_to(mine if link == "symbolic" else tmp_path / "new.txt")
    with pytest.raises(WriteFailed, match=r"\.lock: .* delete it"), RunLock(run):
        pass
    assert mine.read_text() == MINE
    assert not (tmp_path / "new.txt").exists()


@pytest.mark.parametrize("name", ["config.toml", "run.json", "figures.json", "loss.png", "adapter", "checkpoint-3"])
def test_a_run_does_not_write_through_a_link(
    name: str, mine: Path, base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")  # it looks like a run
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(mine)
    before = sorted(run.iterdir())
    assert train(base, rows, run) == 2
    assert f"the file name {name!r} leads out of the folder" in " ".join(capsys.readouterr().err.split())
    assert sorted(run.iterdir()) == before
    assert mine.read_text() == MINE


def test_a_link_to_the_output_folder_itself_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    with RunLock(tmp_path / "run"):
        assert (tmp_path / "disk" / ".lock").is_file()


def test_plots_and_results_are_not_written_through_a_link(mine: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png").symlink_to(mine)
    with pytest.raises(ValueError, match="leads out of the folder"):
        check_files(tmp_path / "out", ["a.png"], overwrite=True)
    with pytest.raises(ValueError, match="leads out of the folder"):
        check_continued(tmp_path / "out", ["a.png"], "plots", ours=True, fresh=False)


def hostile(file: Path, way: str) -> None:
    """Replace a file by one that blocks, never ends, is too large or nested too deeply."""
    file.unlink()
    if way == "pipe":
        os.mkfifo(file)
    elif way == "endless":
        file.symlink_to("/dev/zero")
    elif way == "large":
        with file.open("wb") as opened:
            opened.truncate(30 << 30)
    else:
        file.write_text("[" * 100_000 + "]" * 100_000)


@pytest.mark.parametrize("way", ["pipe", "endless", "large", "deep"])
def test_files_of_a_checkpoint_that_nobody_should_read(way: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    write_tree(tmp_path, "state", {"a": 1})
    shutil.copy(tmp_path / "state.json", tmp_path / "checkpoint-1" / "manifest.json")
    hostile(tmp_path / "checkpoint-1" / "manifest.json", way)
    (problem,) = verify(tmp_path / "checkpoint-1")
    assert "manifest.json: " in problem
    hostile(tmp_path / "state.json", way)
    with pytest.raises(StateError, match=r"state\.json"):
        read_tree(tmp_path, "state")
