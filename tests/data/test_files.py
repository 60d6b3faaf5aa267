"""Rows in every kind of file. The judge is the same rows in JSONL; files are written by pyarrow, datasets and csv."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import datasets
import pyarrow
import pyarrow.csv
import pyarrow.feather
import pyarrow.json
import pyarrow.parquet
import pytest

from reparam.data import files
from reparam.data.rows import Reading, read_rows
from reparam.errors import DataError

ROWS = [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}", "note": 'a "b", c\nd'} for i in range(5)]


def jsonl() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def table(delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ROWS[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue().encode()


def write(folder: Path, name: str) -> Path:
    path = folder / name
    arrow = pyarrow.Table.from_pylist(ROWS)
    match name.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]:
        case "jsonl":
            content = jsonl()
        case "json":
            content = json.dumps(ROWS, indent=1).encode()
        case "csv":
            content = table(",")
        case "tsv":
            content = table("\t")
        case "parquet":
            pyarrow.parquet.write_table(arrow, path, row_group_size=2)
            return path
        case "feather":
            pyarrow.feather.write_feather(arrow, path)
            return path
        case "arrow":
            with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, arrow.schema) as stream:
                stream.write_table(arrow)
            return path
    if name.endswith(".gz"):
        content = gzip.compress(content)
    if name.endswith(".zst"):
        content = bytes(pyarrow.compress(content, codec="zstd", asbytes=True))
    path.write_bytes(content)
    return path


def contents(rows) -> list[dict]:
    return [row.as_json() for row in rows]


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl",
        "a.json",
        "a.csv",
        "a.tsv",
        "a.parquet",
        "a.feather",
        "a.arrow",
        "a.jsonl.gz",
        "a.csv.gz",
        "a.json.zst",
    ],
)
def test_every_kind_of_file_holds_the_same_rows(tmp_path, name):
    path = write(tmp_path, name)
    rows = read_rows(path)
    assert contents(rows) == ROWS
    assert all(row.source.startswith(f"{path}:") for row in rows)
    assert len({row.source for row in rows}) == len(rows)


def test_globs_and_folders_are_read_in_order(tmp_path):
    for i, row in enumerate(ROWS):
        (tmp_path / f"part-{i}.jsonl").write_text(json.dumps(row))
    assert contents(read_rows(tmp_path)) == ROWS
    assert contents(read_rows(f"{tmp_path}/part-[13].jsonl")) == [ROWS[1], ROWS[3]]
    (tmp_path / "train-0.jsonl").write_text(json.dumps(ROWS[0]))
    assert contents(read_rows(tmp_path)) == [ROWS[0]]
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(DataError, match="holds files of several kinds"):
        read_rows(tmp_path)


def test_folders_of_datasets(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert contents(read_rows(tmp_path / "one")) == ROWS
    both = {"train": datasets.Dataset.from_list(ROWS[:3]), "test": datasets.Dataset.from_list(ROWS[3:])}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "two")
    assert contents(read_rows(tmp_path / "two")) == ROWS[:3]
    datasets.DatasetDict({"test": both["test"]}).save_to_disk(tmp_path / "three")
    with pytest.raises(DataError, match="no split 'train'; the data set has test"):
        read_rows(tmp_path / "three")


def test_standard_input(tmp_path):
    code = "from reparam.data.rows import read_rows; print([row.as_json() for row in read_rows('-')])"
    done = subprocess.run([sys.executable, "-c", code], input=jsonl(), capture_output=True, check=True)
    assert eval(done.stdout) == ROWS


def problem(path: Path | str) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(path)
    return caught.value.problems[0]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", b'[{"text": "a"}, 3]', "a.json:row 2: expected an object, got a number"),
        ("a.json", b'[{"text": "a"},\n {"text": }]', "a.json:2:11: malformed JSON"),
        ("a.csv", b"text,b\n1\n", "a.csv:2: 1 fields, and the header has 2"),
        ("a.csv", b"text,text\n1,2\n", "a.csv:1: two columns of the header have the same name"),
        ("a.csv", b"text\n\xff\n", "a.csv:2: byte 0xff at offset 5 is not UTF-8"),
        ("a.csv", "text\na\n".encode("utf-16"), "a.csv:1: the file is UTF-16; save it as UTF-8"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "a.jsonl:1: the file is UTF-16; save it as UTF-8"),
        ("a.json", '[{"text": "a"}]'.encode("utf-16"), "a.json:1: the file is UTF-16; save it as UTF-8"),
        ("a.json", b'[{"text": "\xff"}]', "a.json: byte 0xff at offset 11 is not UTF-8"),
        ("a.csv", b'text\n"a\n', "a.csv:2: malformed table: unexpected end of data"),
        ("a.parquet", b"PAR1 and nothing else", "a.parquet: cannot be read after row 0: "),
        ("a.arrow", b"nothing", "a.arrow: cannot be read after row 0: "),
        ("a.jsonl.gz", b"not compressed", "a.jsonl.gz: cannot be read: "),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:40], "a.jsonl.gz: cannot be read: "),
        ("a.jsonl.zst", b"not compressed", "a.jsonl.zst: cannot be read: "),
    ],
)
def test_damaged_files(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    assert problem(path).startswith(f"{tmp_path}/{expected}")


def test_a_file_without_an_end_of_line_is_not_read_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(files.jsonl, "LARGEST_LINE", 2**20)
    monkeypatch.setattr(files.table, "LONGEST", 2**20)
    for name in ("a.jsonl", "a.csv", "a.json"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(30 << 30)
        tracemalloc.start()
        assert problem(tmp_path / name).startswith(f"{tmp_path}/{name}:1: a line of more than ")
        assert tracemalloc.get_traced_memory()[1] < 1 << 23
        tracemalloc.stop()


def test_missing_names(tmp_path, monkeypatch):
    assert "its folder" in problem(tmp_path / "none" / "a.jsonl")
    assert "the folder holds no data files; expected .jsonl" in problem(tmp_path)
    (tmp_path / "broken.jsonl").symlink_to("nowhere")
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    for name in ("broken.jsonl", "loop.csv"):
        assert problem(tmp_path / name).endswith(f"{name}: is a link that leads to no file")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    found = problem("nobody/nothing")
    assert found.startswith("nobody/nothing: no such file, and no data set of this name is in the cache of datasets (")
    assert "\n" not in found


@pytest.mark.parametrize(("name", "separator", "wanted"), [("a.csv", ";", "commas"), ("a.tsv", "|", "tabs")])
def test_a_table_with_other_separators_is_refused_with_what_to_do(
    name: str, separator: str, wanted: str, tmp_path: Path
) -> None:
    (file := tmp_path / name).write_text(f"prompt{separator}completion\n1{separator}2\n")
    with pytest.raises(DataError, match=rf"{name}:1: the header has one column, .* separate the fields by {wanted}"):
        read_rows(file)


def test_lines_of_a_text_are_rows_as_in_datasets(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes("\ufeff[a] first\r\n\n  é second \nthird".encode())
    theirs = datasets.load_dataset("text", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))[
        "text"
    ]
    reading = Reading([file])
    found = list(reading)
    assert [row.text for row in found] == [text.removeprefix("\ufeff") for text in theirs if text]
    assert [row.source for row in found] == [f"{file}:{line}" for line in (1, 3, 4)]
    assert reading.notes() == (f"each line of {file} is a text; for longer texts, write JSONL",)


@pytest.mark.parametrize("name", ["rows.txt", "rows", "rows.v2", "rows.data.gz"])
@pytest.mark.parametrize("content", [jsonl(), json.dumps(ROWS, indent=1).encode(), b"\xef\xbb\xbf\n" + jsonl()])
def test_json_is_known_by_its_content(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert [row.prompt for row in read_rows(path)] == [row["prompt"] for row in ROWS]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("sheet.xlsx", b"PK\x03\x04...", "a spreadsheet; export the sheet as CSV"),
        ("rows.zip", b"PK\x03\x04...", "an archive; unpack it"),
        ("rows.tar.gz", gzip.compress(b"rows.jsonl\x00"), "an archive; unpack it"),
        ("rows.pkl", b"\x80\x04K\x01.", "can run code when they are read"),
        ("rows.h5", b"\x89HDF", "arrays; write one JSON object per line"),
        ("paper.pdf", b"%PDF-1.7", "a document; write one JSON object per line"),
        ("notes.md", b"# Title", "name it .txt"),
        ("rows.txt", b"\x80\x04K\x01.", "Python objects"),
        ("rows", b"PAR1....", r"a Parquet file; let its name end in \.parquet"),
        ("rows", b"plain words", "no JSON, and its name has no suffix"),
        ("rows.foo", b"plain words", r"the suffix '\.foo'"),
    ],
)
def test_files_that_hold_no_rows_are_named_for_what_they_are(
    tmp_path: Path, name: str, content: bytes, told: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{re.escape(str(path))}: holds .*{told}") as error:
        read_rows(path)
    assert len(error.value.problems) == 1


def test_a_text_beside_data_files_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "license.txt").write_text("a license")
    assert read_rows(tmp_path)[0].text == "a license"
    (tmp_path / "rows.jsonl").write_bytes(jsonl())
    assert len(read_rows(tmp_path)) == len(ROWS)
