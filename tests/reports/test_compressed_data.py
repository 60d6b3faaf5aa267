"""Data files that become far larger than they are: refused in one sentence, long before they fill the memory."""

from __future__ import annotations

import contextlib
import gzip
import os
import signal
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from reparam.data.files import arrow, opened
from reparam.data.rows import read_rows
from reparam.errors import DataError

ROW = b'{"prompt": "a", "completion": "b"}\n'


def gz(path: Path, content: bytes) -> None:
    path.write_bytes(gzip.compress(content))


def zst(path: Path, content: bytes) -> None:
    with pyarrow.output_stream(str(path), compression="zstd") as stream:
        stream.write(content)


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opened, "FREE", 2**20)


@pytest.mark.parametrize("suffix", ["jsonl.gz", "json.gz", "jsonl.zst"])
@pytest.mark.usefixtures("small_limit")
def test_files_that_decompress_to_too_much(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{suffix}"
    content = {
        "jsonl.gz": b" " * 2**16 + b"\n",
        "json.gz": b"[" + b" " * 2**16,
        "jsonl.zst": b" " * 2**16 + b"\n",
    }
    write: Callable[[Path, bytes], None] = zst if suffix.endswith("zst") else gz
    write(path, content[suffix] * (2**24 // len(content[suffix])))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"decompresses to more than .*, 200 times its size of .*decompress it first$"):
        read_rows(path)
    assert tracemalloc.get_traced_memory()[1] < 2**25  # a part of what the file becomes
    tracemalloc.stop()


@pytest.mark.usefixtures("small_limit")
def test_what_real_data_compresses_to_is_read(tmp_path: Path) -> None:
    rows = b"".join(b'{"prompt": "%d", "completion": "%s"}\n' % (i, b"word " * (i % 50)) for i in range(1, 10_000))
    assert len(rows) > opened.FREE
    for write, name in ((gz, "rows.jsonl.gz"), (zst, "rows.jsonl.zst")):
        write(tmp_path / name, rows)
        assert len(read_rows(tmp_path / name, None)) == 9_999


def test_columns_that_take_no_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nulls take no bytes, so a file of a few hundred bytes can claim any number of rows."""
    path = tmp_path / "rows.arrow"
    batch = pyarrow.RecordBatch.from_arrays([pyarrow.nulls(2**24)], names=["text"])
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    assert path.stat().st_size < 2**10
    with pytest.raises(DataError, match="claims more than 1,048,576 rows, too many for a file of its size"):
        read_rows(path)
    monkeypatch.setattr(arrow, "FREE_ROWS", 2**10)
    monkeypatch.setattr(arrow, "ROWS_IN_BYTE", 1)
    table = pyarrow.table({"prompt": ["a"] * 2**14, "completion": ["b"] * 2**14})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert (tmp_path / "rows.parquet").stat().st_size < 2**13
    with pytest.raises(DataError, match=r"rows.parquet: claims more than [\d,]+ rows"):
        read_rows(tmp_path / "rows.parquet")


@pytest.mark.usefixtures("small_limit")
def test_one_text_in_many_rows(tmp_path: Path) -> None:
    table = pyarrow.table({"prompt": ["a"] * 2**12, "completion": ["b" * 2**14] * 2**12})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows.parquet: holds more than 1 MiB, 200 times its size"):
        read_rows(tmp_path / "rows.parquet")


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("place", range(0, 60, 7))
def test_damage_in_a_compressed_file(suffix: str, place: int, tmp_path: Path) -> None:
    path = tmp_path / f"rows.jsonl.{suffix}"
    (zst if suffix == "zst" else gz)(path, ROW * 3 + b"".join(b'{"text": "%d"}\n' % (i * 7919) for i in range(50)))
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(bytes(content))
    with contextlib.suppress(DataError):  # no other error; the flip of a flag or of a time can do nothing
        read_rows(path)


class Interrupted(BaseException):
    """What a signal raises."""


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst"])
def test_the_wait_for_the_writer_of_a_pipe_can_be_interrupted(name: str, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise Interrupted

    def write_late() -> None:  # ends the wait of a reader that the signal does not reach
        if not over.wait(10):
            late.append(name)
            with (tmp_path / name).open("wb"):
                pass

    os.mkfifo(tmp_path / name)
    over, late = threading.Event(), list[str]()
    writer = threading.Thread(target=write_late)
    writer.start()
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with contextlib.suppress(DataError), pytest.raises(Interrupted):
            read_rows(tmp_path / name)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        over.set()
        writer.join()
    assert not late
