"""Output folders: found to be unusable before the work, never mixed with other files; bases are named by full paths."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from command import reparam, train

from reparam.errors import WriteFailed
from reparam.io.outputs import check_writable


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_folder_that_cannot_be_written_is_found_first(
    rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert train("no-such-model", rows, file / "out") == 1  # the model would be missed later
    assert f"{file}: Not a directory" in " ".join(capsys.readouterr().err.split())
    assert file.read_text() == "mine"


def test_a_folder_with_other_files_is_refused(
    base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "config.json").write_text("{}")
    before = content(tmp_path)
    for options, names in (([], "adapter; thesis.tex"), (["--fresh"], "adapter")):
        assert train("no-such-model", rows, tmp_path, *options) == 2
        assert f"holds files ({names}) but no run.json" in " ".join(capsys.readouterr().err.split())
        assert content(tmp_path) == before
    shutil.rmtree(tmp_path / "adapter")
    assert train(base, rows, tmp_path, "--max_steps", 2, "--fresh") == 0
    assert (tmp_path / "thesis.tex").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_not_writable(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    for folder in (tmp_path, tmp_path / "new" / "out"):
        with pytest.raises(WriteFailed, match="Permission denied"):
            check_writable(folder, inside=True)


def test_nothing_is_left_by_the_check(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b", inside=True)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(WriteFailed, match="no folder can be created in /proc"):
        check_writable("/proc/out", inside=True)


def test_a_base_is_named_by_its_full_path(
    base: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(base, tmp_path / "model")
    shutil.copy(rows, tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    assert train("model", "rows.jsonl", "out", "--max_steps", 2) == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert json.loads((tmp_path / "out/adapter/adapter.json").read_text())["base"]["source"] == str(tmp_path / "model")
    assert reparam("generate", "def f(x):", "-a", tmp_path / "out") == 0
    assert reparam("train", "-c", tmp_path / "out" / "config.toml", "-o", "again") == 0
    assert content(tmp_path / "out" / "adapter") == content(elsewhere / "again" / "adapter")
    (tmp_path / "model").rename(tmp_path / "moved")
    capsys.readouterr()
    assert reparam("generate", "def f(x):", "-a", tmp_path / "out") == 2
    assert "does not exist; pass its folder or hub id with --base" in " ".join(capsys.readouterr().err.split())
