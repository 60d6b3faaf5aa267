"""Folders that another process replaces, that are no regular files, that a signal or a failing disk interrupts."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from adapters import trained
from models import IDS, llama

import reparam
from reparam.hf import prompts
from reparam.io import files, native
from reparam.io.staged import staged_folder, write_file
from reparam.io.steady import steady
from reparam.methods.prompts import Prompt

LEFT = ".out.reparam-{}-0123456789ab"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    trained(llama()).save(tmp_path / "run" / "adapter")
    return tmp_path / "run" / "adapter"


@pytest.fixture
def alarm() -> Iterator[None]:
    """End a test that blocks."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# ---- a reader beside a writer

WRITER = """
import sys
from pathlib import Path
from reparam.io.staged import staged_folder
old, new, target = map(Path, sys.argv[1:])
contents = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in (old, new)]
print("ready", flush=True)
while True:
    for content in contents:
        with staged_folder(target, owned=True) as staged:
            for name, value in content.items():
                (staged / name).write_bytes(value)
"""


@pytest.mark.parametrize("format", ["reparam", "peft"])
def test_a_reader_never_fails_beside_a_writer_and_never_mixes(tmp_path: Path, format: str) -> None:
    records = []
    for seed in range(2):
        trained(llama(), method=reparam.LoRA(r=2, alpha=1 + seed), seed=seed).save(tmp_path / str(seed), format=format)
        records.append(files.read(tmp_path / str(seed)))
    target = tmp_path / "run" / "adapter"
    files.write(target, records[0], format=format)
    command = [sys.executable, "-c", WRITER, str(tmp_path / "0"), str(tmp_path / "1"), str(target)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.readline()
    seen = set()
    try:
        for _ in range(150):
            found = files.read(files.adapter_folder(target.parent))
            [which] = [i for i, one in enumerate(records) if one.method == found.method]
            assert all(torch.equal(value, records[which].tensors[key]) for key, value in found.tensors.items())
            seen.add(which)
    finally:
        writer.kill()
        writer.communicate()
    assert seen == {0, 1}


def test_a_writer_thread_in_this_process(tmp_path: Path) -> None:
    record = trained(llama()).record()
    target = tmp_path / "out"
    files.write(target, record)
    stop = threading.Event()

    def save() -> None:
        while not stop.is_set():
            files.write(target, record)

    thread = threading.Thread(target=save)
    thread.start()
    try:
        for _ in range(50):
            files.read(target)
    finally:
        stop.set()
        thread.join()


def test_a_folder_that_stays_the_same_is_refused_at_once(folder: Path) -> None:
    calls = []

    def read() -> None:
        calls.append(1)
        raise reparam.FormatError("damaged")

    for place in (folder, folder / "absent"):
        calls.clear()
        with pytest.raises(reparam.FormatError, match="damaged"):
            steady(place, read)
        assert len(calls) == 1


# ---- what is not a regular file


@pytest.mark.parametrize("name", ["adapter.json", "adapter.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_only_regular_files_are_read(folder: Path, name: str, kind: str, alarm: None) -> None:
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to("/dev/zero")
    with pytest.raises(reparam.FormatError, match=f"{name}: not a regular file"):
        reparam.load(llama(), folder)


@pytest.mark.parametrize("kind", ["new", "old"])
def test_a_pipe_named_like_a_leftover_is_left_alone(tmp_path: Path, kind: str, alarm: None) -> None:
    os.mkfifo(tmp_path / LEFT.format(kind))
    (tmp_path / LEFT.format("new").replace("ab", "cd")).mkdir()
    trained(llama()).save(tmp_path / "out")
    write_file(tmp_path / "out.json", b"{}")
    assert stat.S_ISFIFO(os.lstat(tmp_path / LEFT.format(kind)).st_mode)
    assert sorted(p.name for p in tmp_path.iterdir()) == [LEFT.format(kind), "out", "out.json"]
    assert files.read(tmp_path / "out").sites


def test_a_pipe_is_not_replaced_by_a_file(tmp_path: Path, alarm: None) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="not a regular file"):
        write_file(tmp_path / "pipe", b"x")


# ---- sizes


def test_a_file_is_refused_by_its_size_before_it_is_read(folder: Path) -> None:
    content = (folder / native.WEIGHTS).read_bytes()
    os.truncate(folder / native.WEIGHTS, 30 << 30)
    with pytest.raises(reparam.FormatError, match="more than the"):
        reparam.load(llama(), folder)
    (folder / native.WEIGHTS).write_bytes(content)
    os.truncate(folder / native.WEIGHTS, len(content) + 1000)
    with pytest.raises(reparam.FormatError, match="its header states"):
        reparam.load(llama(), folder)
    os.truncate(folder / native.CONFIG, 3 << 30)
    with pytest.raises(reparam.FormatError, match=r"adapter.json: 3,221,225,472 bytes, more than"):
        reparam.load(llama(), folder)


def test_a_key_that_occurs_twice_is_refused(folder: Path) -> None:
    text = (folder / native.CONFIG).read_text()
    (folder / native.CONFIG).write_text(text.replace('"version": 1', '"version": 1, "version": 1', 1))
    with pytest.raises(reparam.FormatError, match="'version' occurs twice"):
        reparam.load(llama(), folder)


# ---- run folders


def test_the_folder_of_a_training_run_loads(folder: Path) -> None:
    one, other = llama(), llama()
    reparam.load(one, folder)
    reparam.load(other, folder.parent)
    assert torch.equal(one(input_ids=IDS).logits, other(input_ids=IDS).logits)
    trained(llama(), seed=5).save(folder / "adapter")  # a folder inside an adapter's is not taken for it
    assert files.adapter_folder(folder) == folder


# ---- signals, permissions, failures

STAGING = """
import sys, time
from pathlib import Path
from reparam.io.staged import staged_folder
with staged_folder(sys.argv[1]) as staged:
    (staged / "weights").write_bytes(bytes(1000))
    print("staged", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    child = subprocess.Popen([sys.executable, "-c", STAGING, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    child.send_signal(number)
    child.communicate()
    assert child.returncode in (128 + signal.SIGTERM, -signal.SIGINT)
    assert list(tmp_path.iterdir()) == []


def test_a_handler_of_the_program_stays(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with staged_folder(tmp_path / "a"):
        assert callable(signal.getsignal(signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) == before
    called = []
    signal.signal(signal.SIGTERM, lambda *_: called.append(1))
    try:
        with staged_folder(tmp_path / "b"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert called == [1]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_of_a_saved_folder_follow_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with staged_folder(tmp_path / "out") as staged:
            (staged / "private").touch(mode=0o600)
            llama().save_pretrained(staged)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()} == {0o666 & ~mask}


def test_a_failing_disk_is_one_sentence(tmp_path: Path) -> None:
    found = pytest.raises(reparam.WriteFailed, match=r"out: cannot be written: Input/output error; no partial")
    with found, staged_folder(tmp_path / "out"):
        raise OSError(errno.EIO, "Input/output error")
    (tmp_path / "file").touch()
    with pytest.raises(reparam.WriteFailed, match=r"Not a directory"):
        write_file(tmp_path / "file" / "below", b"x")
    with pytest.raises(reparam.WriteFailed, match=r"File name too long"):
        write_file(tmp_path / ("x" * 250), b"x")
    with pytest.raises(reparam.FormatError, match=r"cannot be read: (Input/output|Invalid arg|Permission)"):
        native.read_bytes(Path("/proc/self/mem"))


def test_values_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    record = trained(llama()).record()
    record.tensors[next(iter(record.tensors))][0, 0] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinity"):
        files.write(tmp_path / "out", record)
    assert not (tmp_path / "out").exists()


def test_prompts_delete_no_files_of_others(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    adapter = prompts.attach(llama(), Prompt(tokens=2))
    with pytest.raises(ValueError, match=r"holds other files \(notes.txt\)"):
        adapter.save(tmp_path, format="peft")
    assert (tmp_path / "notes.txt").exists()
