"""Staged writes: a partial result is never visible, whatever happens to the writer."""

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from reparam.errors import DiskFull
from reparam.io.staged import digest, inside, recover, staged_folder, write_file

TOKEN = "0123456789ab"


def child(code: str, *args: object) -> "subprocess.CompletedProcess[str]":
    """Run Python code in a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones included, with its content."""
    return {str(f.relative_to(folder)): f.read_text() for f in sorted(folder.rglob("*")) if f.is_file()}


def fill(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content)
    return folder


def stage(target: Path, then: Callable[[Path], object] = lambda folder: None, **files: str) -> None:
    with staged_folder(target) as folder:
        fill(folder, **files)
        then(folder)


def throw(error: BaseException) -> None:
    raise error


@pytest.fixture
def small_files():
    """Limit each file to 64 KiB, which fails like a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


# ---- files


def test_a_file_is_made_with_its_folders_and_replaced(tmp_path):
    target = tmp_path / "a" / "b" / "result.json"
    write_file(target, b"one")
    write_file(target, b"two")
    assert tree(tmp_path) == {"a/b/result.json": "two"}


def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path, small_files):
    target = tmp_path / "result.bin"
    write_file(target, b"old")
    with pytest.raises(DiskFull, match=r"result.bin.*the previous content is intact"):
        write_file(target, bytes(1 << 17))
    assert tree(tmp_path) == {"result.bin": "old"}


def test_a_file_does_not_replace_a_folder(tmp_path):
    fill(tmp_path / "out", a="1")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        write_file(tmp_path / "out", b"x")
    assert tree(tmp_path) == {"out/a": "1"}


def test_a_linked_file_is_replaced_where_it_lies(tmp_path):
    fill(tmp_path / "disk", data="old")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "data")
    write_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "data").read_text() == "new"


# ---- folders


def test_a_folder_is_absent_until_it_is_whole(tmp_path):
    target = tmp_path / "deep" / "out"
    with staged_folder(target) as folder:
        fill(folder, a="1")
        fill(folder / "sub", b="2")
        assert not target.exists()
    assert tree(tmp_path) == {"deep/out/a": "1", "deep/out/sub/b": "2"}


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    target = fill(tmp_path / "out", a="old", gone="old")
    with staged_folder(target, owned=True) as folder:
        fill(folder, a="new")
        assert tree(target) == {"a": "old", "gone": "old"}
    assert tree(tmp_path) == {"out/a": "new"}


def test_what_the_result_lacks_is_not_deleted(tmp_path):
    target = fill(tmp_path / "out", a="old", notes="mine")
    fill(target / "sub", b="mine too")
    with pytest.raises(FileExistsError, match=r"notes, sub/b\).*choose another folder"):
        stage(target, a="new")
    assert tree(tmp_path) == {"out/a": "old", "out/notes": "mine", "out/sub/b": "mine too"}


@pytest.mark.parametrize("stop", [ValueError("no"), KeyboardInterrupt()])
def test_an_error_or_interrupt_leaves_the_old_folder_and_nothing_else(tmp_path, stop):
    target = fill(tmp_path / "out", a="old")
    with pytest.raises(type(stop)):
        stage(target, lambda folder: throw(stop), a="new")
    assert tree(tmp_path) == {"out/a": "old"}


def test_a_folder_does_not_replace_a_file(tmp_path):
    fill(tmp_path, out="a file")
    with pytest.raises(FileExistsError, match="is a file"), staged_folder(tmp_path / "out"):
        pass
    assert tree(tmp_path) == {"out": "a file"}


def test_a_linked_folder_is_replaced_where_it_lies(tmp_path):
    fill(tmp_path / "disk", a="old")
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with staged_folder(tmp_path / "out") as folder:
        fill(folder, a="new")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "a").read_text() == "new"


def test_one_staged_folder_within_another(tmp_path):
    # As when an adapter, which stages itself, is written into a checkpoint.
    with staged_folder(tmp_path / "outer") as outer:
        with staged_folder(outer) as inner:
            fill(inner, a="1")
        fill(outer, b="2")
    assert tree(tmp_path) == {"outer/a": "1", "outer/b": "2"}


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: (folder / "big").write_bytes(bytes(1 << 17)),
        lambda folder: save_file({"x": torch.zeros(1 << 17)}, folder / "big"),
    ],
    ids=["python", "safetensors"],
)
def test_a_full_disk_leaves_the_old_folder(tmp_path, small_files, write):
    target = fill(tmp_path / "out", a="old")
    with pytest.raises(DiskFull, match=r"out .*the previous content is intact"):
        stage(target, write, a="new")
    assert tree(tmp_path) == {"out/a": "old"}


def test_an_error_that_only_looks_like_a_full_disk_stays_what_it_is(tmp_path):
    with pytest.raises(FileNotFoundError), staged_folder(tmp_path / "out"):
        (tmp_path / "none").read_text()


# ---- killed writers


KILLED = """
import os, signal, sys
from pathlib import Path
from reparam.io import staged

point, target = sys.argv[1], Path(sys.argv[2])
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
rename, removes = os.rename, []

def watched(source, goal):  # the process dies right before or after a rename of the swap
    if point == "before the last rename" and Path(goal) == target and "new" in Path(source).name and removes:
        kill()
    if Path(source) == target:
        removes.append(source)
    rename(source, goal)
    if point == "after the last rename" and Path(goal) == target and "new" in Path(source).name:
        kill()

os.rename = watched
with staged.staged_folder(target, owned=True) as folder:
    (folder / "a").write_text("new")
    if point == "while staging":
        kill()
"""


@pytest.mark.parametrize(
    ("point", "seen", "recovered"),
    [
        ("while staging", "old", "old"),
        ("before the last rename", None, "old"),
        ("after the last rename", "new", "new"),
    ],
)
def test_a_killed_writer(tmp_path, point, seen, recovered):
    target = fill(tmp_path / "out", a="old")
    result = child(KILLED, point, target)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert (tree(target).get("a") if target.exists() else None) == seen
    assert len(list(tmp_path.iterdir())) > 1 or seen is None, "nothing was left over: the kill came at another point"
    recover(tmp_path)
    assert tree(tmp_path) == {"out/a": recovered}


def test_the_next_writer_clears_what_a_killed_one_left(tmp_path):
    target = fill(tmp_path / "out", a="old")
    child(KILLED, "while staging", target)
    fill(tmp_path / f".out.reparam-old-{TOKEN}", a="older")
    write_file(tmp_path / "other", b"x")
    assert len(list(tmp_path.iterdir())) == 4, "another target's leftovers are not touched"
    with staged_folder(target) as folder:
        fill(folder, a="new")
    assert tree(tmp_path) == {"other": "x", "out/a": "new"}


def test_the_work_of_a_live_writer_is_not_cleared(tmp_path):
    with staged_folder(tmp_path / "out") as folder:
        fill(folder, a="new")
        result = child("import sys; from reparam.io.staged import recover; recover(sys.argv[1])", tmp_path)
        assert result.returncode == 0, result.stderr
    assert tree(tmp_path) == {"out/a": "new"}


# ---- reading


def test_inside_gives_the_path(tmp_path):
    fill(tmp_path / "sub", b="2")
    assert inside(tmp_path, "sub/b").read_text() == "2"


@pytest.mark.parametrize("name", ["../x", "sub/../../x", "/etc/passwd", ".", "", "link/passwd"])
def test_inside_refuses_to_leave(tmp_path, name):
    folder = fill(tmp_path / "in")
    (folder / "link").symlink_to("/etc")
    with pytest.raises(ValueError, match="leads out of the folder"):
        inside(folder, name)


def test_digest_is_that_of_sha256sum(tmp_path):
    fill(tmp_path, a="abc")
    assert digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_modes_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_file(tmp_path / "file", json.dumps({}).encode())
        with staged_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750
