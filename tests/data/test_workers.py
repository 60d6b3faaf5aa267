"""Rows that several processes encode are those that one encodes, byte for byte, and so are the errors."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import chat_tokenizers as kit
import pytest
import torch

from reparam.data import encode as encoding
from reparam.data import workers
from reparam.data.corpus import Corpus
from reparam.data.encode import encode_all
from reparam.data.row import Row
from reparam.data.rows import Reading
from reparam.errors import DataError, WorkerLost

TOKENIZER = kit.make(kit.CHATML)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "BATCH", 5)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Chats and completions with everything that is counted: flags, unknown keys, tasks, long and split rows."""
    rows = []
    for i in range(48):
        answer = {"role": "assistant", "content": f"the {i}. " * (1 + i % 9)}
        extra = {"name": "n"} if i == 40 else {}
        rows.append({"messages": [{"role": "user", "content": f"q {i}"}, answer | extra], "task": f"t{i % 3}", "id": i})
        rows.append({"prompt": f"p {i}", "completion": "" if i % 11 == 7 else f" c {kit.END if i == 30 else i}"})
    path = tmp_path / "rows7.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def encoded(source: Path, count: int | None, folder: Path | None = None) -> Corpus:
    rows = Reading([source])
    return encode_all(
        rows, TOKENIZER, max_length=40, bad_rows="drop", with_tasks=True, workers=count, folder=folder, too_long="split"
    )


def test_the_result_is_that_of_one_process(file: Path, tmp_path: Path) -> None:
    folders = [tmp_path / str(count) for count in (1, 2)]
    for folder in folders:
        folder.mkdir()
    one, two = (encoded(file, count, folder) for count, folder in zip((1, 2), folders, strict=True))
    for array in folders[0].iterdir():
        assert array.read_bytes() == (folders[1] / array.name).read_bytes(), array.name
    assert len(one) == 96
    for key in ("names", "tasks", "reasons", "unused", "largest", "kinds"):
        assert getattr(one, key) == getattr(two, key), key
    assert one.marks.keys() == two.marks.keys()
    assert all(torch.equal(one.marks[what], two.marks[what]) for what in one.marks)
    assert one.part().report == two.part().report
    assert not multiprocessing.active_children()


def test_by_itself_only_many_rows_start_processes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(workers, "_in_processes", lambda batches, make, count: started.append(count) or iter(()))
    monkeypatch.setattr(workers, "usable", lambda: 64)
    encoded(file, None)
    assert not started
    monkeypatch.setattr(workers, "ALONE", 100)
    assert len(encoded(file, None)) < 96  # the rest was left to the processes
    assert started == [workers.MOST]


@pytest.mark.parametrize("count", [1, 2])
def test_errors_are_those_of_the_first_rows(tmp_path: Path, count: int) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        '{"messages": [{"role": "user", "content": "q"}]}' if i in (12, 33) else '{"prompt": "p", "completion": "c"}'
        for i in range(50)
    ]
    path.write_text("\n".join(rows))
    with pytest.raises(DataError) as error:
        encode_all(Reading([path]), TOKENIZER, max_length=40, workers=count)
    assert [problem.split(": ")[0] for problem in error.value.problems] == [f"{path}:13", f"{path}:34"]
    path.write_text("\n".join([*rows, "{"]))
    with pytest.raises(DataError, match=r":51:2: malformed"):
        encode_all(Reading([path]), TOKENIZER, max_length=40, workers=count)


def test_an_error_of_a_worker_comes_before_one_of_later_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "stop"}]}\n' * 30 + "{"
    )
    endless = "{% macro m() %}{{ m() }}{% endmacro %}"
    tokenizer = kit.make(endless + "{% if messages[-1].content == 'stop' %}{{ m() }}{% endif %}")
    found = []
    for count in (1, 2):
        with pytest.raises(DataError) as error:
            encode_all(Reading([path]), tokenizer, max_length=40, workers=count)
        found.append(error.value.problems)
    assert found[0] == found[1]
    assert f"{path}:1: " in found[0][0]


def endless() -> Iterator[Row]:
    while True:
        yield Row("text", "a:1", text="some words")


def test_an_interrupt_ends_all_processes() -> None:
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        encode_all(endless(), TOKENIZER, max_length=40, workers=2)
    assert not multiprocessing.active_children()


def test_a_process_that_is_killed_is_reported() -> None:
    def kill() -> None:
        multiprocessing.active_children()[0].kill()

    threading.Timer(0.5, kill).start()
    with pytest.raises(WorkerLost, match=r"--data\.workers 1"):
        encode_all(endless(), TOKENIZER, max_length=40, workers=2)
