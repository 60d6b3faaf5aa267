"""A command that finds something where it is to write refuses before it reads anything, unless told to replace it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from adapters import trained
from command import reparam
from models import save_base

from reparam.errors import WriteFailed
from reparam.hf import models as hf_models
from reparam.io import files
from reparam.io.outputs import check_adapter_folder, check_continued, check_model_folder, check_writable
from reparam.recipes import intrinsic as study


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base, two adapters of it, and folders that hold something."""
    save_base(tmp_path / "base")
    model = hf_models.load_base(str(tmp_path / "base"))
    for number in range(2):
        adapter = trained(model, seed=number, name=f"a{number}")
        adapter.save(tmp_path / f"a{number}")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize(
    "command",
    [
        "merge {out} -a {a0}",
        "compose {a0} {a1} -o {out}",
        "compose {a0} {a1} --search nothing -o {out}",
        "compress {a0} {out} --rank 1",
        "quantize {base} {out} --block 32",
        "compare --base {base} --data.train nothing --methods lora -o {out}",
        "intrinsic --base {base} --data nothing -o {out}",
        "demo -o {out}",
    ],
)
def test_refused(command: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    def load(*args: Any, **settings: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    before = content(place)
    names = {name: place / name for name in ("base", "a0", "a1")}
    for out, why in (("notes", "not empty"), ("a1", "not empty"), ("file", "is a file"), ("file/x", "written there")):
        if out == "a1" and "{a1}" in command:
            continue
        words = [word.format(out=place / out, **names) for word in command.split()]
        assert reparam(*words) in (1, 2), out
        assert why in " ".join(capsys.readouterr().err.split()), out
        assert content(place) == before


def test_replaced_when_asked(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, one, two, out = (place / name for name in ("base", "a0", "a1", "out"))
    for command in (
        ["compress", one, out, "--rank", 1],
        ["compose", one, two, "-o", out],
        ["compress", two, out, "--rank", 2],
    ):
        if out.exists():
            before = content(out)
            assert reparam(*command) == 2
            assert content(out) == before
        assert reparam(*command, "--overwrite_output_dir") == 0
    assert {p.name for p in out.iterdir()} == {"adapter.json", "adapter.safetensors"}
    assert files.read(out).method == files.read(two).method
    (out / "mine.txt").write_text("mine")
    assert reparam("compress", two, out, "--rank", 1, "--overwrite_output_dir") == 2
    assert "mine.txt" in capsys.readouterr().err

    merged = place / "merged"
    assert reparam("merge", merged, "-a", one, "-b", base) == 0
    first = content(merged)
    (merged / "model-00001-of-00002.safetensors").write_bytes(b"of an earlier model")
    assert reparam("merge", merged, "-a", two, "-b", base) == 2
    assert reparam("merge", merged, "-a", two, "-b", base, "--overwrite-output-dir") == 0
    assert content(merged).keys() == first.keys()
    assert content(merged)["model.safetensors"] != first["model.safetensors"]
    assert reparam("merge", one, "-a", two, "-b", base, "--overwrite_output_dir") == 2  # an adapter is no model
    assert "adapter.json" in capsys.readouterr().err


def test_plots(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "notes" / "ranks.png").write_bytes(b"mine")
    assert reparam("inspect", place / "a0", "--plot", place / "notes") == 2
    assert "ranks.png" in capsys.readouterr().err
    assert (place / "notes" / "ranks.png").read_bytes() == b"mine"
    assert reparam("inspect", place / "a0", "--plot", place / "notes", "--overwrite_output_dir") == 0
    assert (place / "notes" / "ranks.png").read_bytes().startswith(b"\x89PNG")
    assert (place / "notes" / "mine.txt").read_text() == "mine"
    assert reparam("inspect", place / "a0", "--plot", place / "file") == 2


def test_a_study_goes_on_in_its_own_folder_alone(tmp_path: Path) -> None:
    def check(folder: Path, *, ours: bool = False, fresh: bool = False) -> None:
        check_continued(folder, study.RESULTS, "results", ours=ours, fresh=fresh)

    check(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    check(tmp_path / "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        check(tmp_path / "other")
    check(tmp_path / "other", fresh=True)
    (tmp_path / "other" / "runs").mkdir()
    with pytest.raises(ValueError, match="holds runs"):
        check(tmp_path / "other", fresh=True)
    check(tmp_path / "other", ours=True)


def test_a_place_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in ("/proc/no/such", str(tmp_path / "file" / "x" / "y"), str(tmp_path / ("n" * 250))):
        with pytest.raises(WriteFailed, match="nothing can be written there"):
            check_writable(Path(place))
        with pytest.raises(WriteFailed):
            check_model_folder(Path(place), overwrite=True)
    check_writable(tmp_path / "a" / "b")
    check_adapter_folder(tmp_path / "a", "peft", overwrite=False)
    assert {p.name for p in tmp_path.iterdir()} == {"file"}
    with pytest.raises(ValueError, match="expected one of"):
        check_adapter_folder(tmp_path / "a", "pickle", overwrite=True)


def test_train_finds_it_before_the_data(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reparam("train", "--base.path", place / "base", "--data.train", "nothing", "-o", place / "file" / "x") == 1
    assert "nothing can be written there" in " ".join(capsys.readouterr().err.split())
