"""Encoded rows are kept in a folder and used again; whatever changes them, or damages the folder, makes them anew."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from command import reparam, train
from sampled import FULL

from reparam.data.batches import Encoded
from reparam.data.encode import encode
from reparam.data.rows import read_rows
from reparam.hf.models import load_tokenizer
from reparam.train import data as module
from reparam.train.cache import clear
from reparam.train.config import resolve
from reparam.train.data import read_data


@pytest.fixture
def file(rows: str, tmp_path: Path) -> Path:
    return Path(shutil.copy(rows, tmp_path / "rows.jsonl"))


def read(base: str, file: Path, tokenizer: Any = None, **settings: object) -> Encoded:
    """All rows of the file, encoded: it holds out other rows."""
    given = {"train": str(file), "valid": str(file), "cache": str(file.parent / "cache"), **settings}
    config = resolve(None, {"base.path": base, **{f"data.{key}": value for key, value in given.items()}})
    return read_data(config, tokenizer or load_tokenizer(base)).train


def folders(file: Path) -> list[Path]:
    return sorted((file.parent / "cache").iterdir())


def same(a: Encoded, b: Encoded) -> bool:
    return (
        list(a.sources) == list(b.sources)
        and a.digest() == b.digest()
        and a.text_bytes.tolist() == b.text_bytes.tolist()
        and a.report.warnings == b.report.warnings
        and str(a.report) == str(b.report)
    )


def test_what_is_read_equals_what_was_encoded(base: str, file: Path) -> None:
    plain = encode(read_rows(file), load_tokenizer(base), max_length=60)
    assert plain.report.truncated  # so that there is a warning
    made = read(base, file, max_length=60)
    (before,) = folders(file)
    stamp = (before / "ids").stat().st_mtime_ns
    again = read(base, file, max_length=60)
    assert same(made, plain)
    assert same(again, plain)
    assert "kept in the cache" in made.report.lines[0]
    assert "read from the cache" in again.report.lines[0]
    assert folders(file) == [before]
    assert (before / "ids").stat().st_mtime_ns == stamp
    assert again[3]["labels"].tolist() == plain[3]["labels"].tolist()


def test_the_same_rows_under_another_name(base: str, file: Path) -> None:
    made = read(base, file, max_length=60)
    moved = Path(shutil.copy(file, file.with_name("moved.jsonl")))
    again = read(base, moved, max_length=60)
    assert "read from the cache" in again.report.lines[0]
    assert [source.replace("moved", "rows") for source in again.sources] == list(made.sources)
    assert f"{moved}:" in again.report.warnings[0]


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 70},
        {"loss_on": "all"},
        {"too_long": "drop"},
        {"max_rows": 70},
        {"bad_rows": "drop"},
        {"columns": "messages=messages"},
    ],
    ids=str,
)
def test_other_settings_are_other_rows(base: str, file: Path, change: dict[str, object]) -> None:
    read(base, file, max_length=60)
    count = len(folders(file))
    settings = {"max_length": 60, **change}
    assert "kept in the cache" in read(base, file, **settings).report.lines[0]
    assert len(folders(file)) == count + 1


def test_other_content_and_another_tokenizer_are_other_rows(base: str, file: Path, tmp_path: Path) -> None:
    first = read(base, file)
    with file.open("a") as more:
        more.write(json.dumps({"prompt": "def", "completion": " f"}) + "\n")
    longer = read(base, file)
    assert "kept" in longer.report.lines[0]
    assert len(longer) == len(first) + 1
    other = Path(shutil.copytree(base, tmp_path / "other"))
    settings = json.loads((other / "tokenizer.json").read_text())
    settings["added_tokens"].append({**settings["added_tokens"][0], "id": 4000, "content": "def", "special": False})
    (other / "tokenizer.json").write_text(json.dumps(settings))
    assert "kept" in read(str(other), file).report.lines[0]
    with (other / "chat_template.jinja").open("a") as template:
        template.write("{# changed #}")
    assert "kept" in read(str(other), file).report.lines[0]
    assert "read" in read(base, file).report.lines[0]


def flipped(place: Path) -> None:
    data = bytearray(place.read_bytes())
    data[len(data) // 2] ^= 1
    place.write_bytes(data)


DAMAGES = {
    "flipped": flipped,
    "cut": lambda place: place.write_bytes(place.read_bytes()[:-1]),
    "emptied": lambda place: place.write_bytes(b""),
    "deleted": Path.unlink,
    "nested": lambda place: place.write_text("[" * 100_000),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_data_set_is_made_again(base: str, file: Path, damage: str) -> None:
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:20]))
    tokenizer = load_tokenizer(base)
    made = read(base, file, tokenizer, max_length=60)
    (place,) = folders(file)
    names = sorted(each.name for each in place.iterdir())
    assert "marks-0" in names
    names = [name for name in names if (place / name).stat().st_size]
    for name in names if FULL else names[list(DAMAGES).index(damage) % 2 :: 2]:  # each file has several kinds of damage
        DAMAGES[damage](place / name)
        again = read(base, file, tokenizer, max_length=60)
        assert "damaged" in again.report.lines[0], name
        assert same(again, made), name
        assert "read from" in read(base, file, tokenizer, max_length=60).report.lines[0]


def test_without_a_cache_nothing_is_written(
    base: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    for choice in ("off", "auto"):
        assert read(base, file, cache=choice).report.lines == ()
    assert not (tmp_path / "xdg").exists()
    monkeypatch.setattr(module, "WORTH_KEEPING", 100)
    assert str(tmp_path / "xdg/reparam/data") in read(base, file, cache="auto").report.lines[0]


def test_a_run_goes_on_with_and_without_it(
    base: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept"
    for steps, choice in ((2, "off"), (4, tmp_path / "cache"), (4, tmp_path / "cache")):
        more = ("--max_steps", steps, "--save_steps", 1, "--lr_scheduler_type", "constant", "--data.cache", choice)
        assert train(base, str(file), kept, *more) == 0
    assert "read from the cache" in " ".join(capsys.readouterr().out.split())
    whole = tmp_path / "whole"
    more = ("--max_steps", 4, "--save_steps", 1, "--lr_scheduler_type", "constant", "--data.cache", "off")
    assert train(base, str(file), whole, *more) == 0
    assert _weights(whole) == _weights(kept)


def _weights(run: Path) -> dict[str, bytes]:
    return {str(f.relative_to(run)): f.read_bytes() for f in sorted((run / "adapter").rglob("*.safetensors"))}


def test_places_that_are_no_folder(base: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("x")
    assert train(base, str(file), tmp_path / "out", "--data.cache", tmp_path / "taken") == 2
    assert "data.cache" in capsys.readouterr().err
    assert train(base, str(file), tmp_path / "out", "--data.cache", "") == 2
    assert "data.cache: '': expected off, auto or a folder" in capsys.readouterr().err


def test_refused_rows_leave_nothing_in_the_cache(base: str, file: Path) -> None:
    file.write_text('{"prompt": 1, "completion": 2}\n')
    with pytest.raises(ValueError, match="must be a string"):
        read(base, file)
    assert folders(file) == []


def test_what_was_not_used_for_the_longest_time_makes_room(base: str, file: Path) -> None:
    read(base, file, max_length=60)
    (first,) = folders(file)
    read(base, file, max_length=61)
    (second,) = set(folders(file)) - {first}
    size = sum(each.stat().st_size for each in first.iterdir())
    for age, place in enumerate((second, first)):
        os.utime(place, (1e9 - age, 1e9 - age))
    read(base, file, max_length=60)  # used again
    lines = read(base, file, max_length=62, cache_limit=int(2.5 * size)).report.lines
    assert "1 data set not used for the longest time made room" in lines[0]
    assert len(folders(file)) == 2
    assert first in folders(file)
    assert "read from the cache" in read(base, file, max_length=60).report.lines[0]
    read(base, file, max_length=63, cache_limit=0)
    assert len(folders(file)) == 1  # the rows at hand stay


def test_mapped_rows_outlive_their_deletion(base: str, file: Path) -> None:
    made = read(base, file, max_length=60)
    before = made.digest()
    assert len(clear(file.parent / "cache")) == 1
    assert folders(file) == []
    assert made.digest() == before
    assert clear(file.parent / "cache") == []


def test_the_cache_is_cleared_from_the_command_line(
    base: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read(base, file)
    (tmp_path / "cache" / "mine.txt").write_text("x")
    assert reparam("data", "--clear-cache", "--data.cache", tmp_path / "cache") == 0
    assert "1 data set (" in capsys.readouterr().out
    assert [each.name for each in folders(file)] == ["mine.txt"]
    assert reparam("data", file, "--clear-cache") == 2
    assert "leave out the rows" in capsys.readouterr().err


def test_processes_that_make_and_delete_at_once(base: str, file: Path) -> None:
    """Four threads share a folder that holds one data set at most; `flock` treats their files as those of processes."""
    wanted = {length: encode(read_rows(file), load_tokenizer(base), max_length=length).digest() for length in (60, 61)}

    def act(number: int) -> bool:
        length = 60 + number % 2
        return read(base, file, max_length=length, cache_limit=0).digest() == wanted[length]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(act, range(8)))
    assert len([each for each in folders(file) if not each.name.startswith(".")]) <= 2


def test_a_data_set_that_vanishes_while_its_size_is_told(
    base: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process makes room between the reading and the report on it."""
    first = read(base, file, max_length=60)
    (place,) = (each for each in folders(file) if each.is_dir())
    scandir = os.scandir

    def deleted(path: Any = ".") -> Any:
        if os.fspath(path) == str(place):
            monkeypatch.setattr(os, "scandir", scandir)
            shutil.rmtree(place)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deleted)
    assert read(base, file, max_length=60).digest() == first.digest()
