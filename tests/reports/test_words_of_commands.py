"""Words of a command line that would have no effect, or another one than meant: refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from adapters import trained
from command import reparam
from huggingface_hub import constants
from models import save_base

from reparam.data.files import reach
from reparam.errors import BaseError
from reparam.hf import models as hf_models


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter of it, a folder that looks like one of a run, and a row."""
    folder = tmp_path_factory.mktemp("place")
    save_base(folder / "base")
    trained(hf_models.load_base(str(folder / "base"))).save(folder / "a")
    trained(hf_models.load_base(str(folder / "base"))).save(folder / "run" / "adapter")
    (folder / "rows.jsonl").write_text('{"prompt": "a b", "completion": "c"}\n')
    return folder


@pytest.fixture
def refused(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command in the folder; returns its error in one line. Nothing may be written."""
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))

    def call(*words: str, code: int = 2) -> str:
        assert reparam(*words) == code
        assert sorted(place.rglob("*")) == before
        found = capsys.readouterr().err.strip().split("\n")
        return found[-1]

    return call


TRAIN = ("train", "--base", "base", "--data", "rows.jsonl")


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("merge", "", "-a", "a"), "output"),
        (("merge", "new", "-a", ""), "--adapter"),
        (("merge", "new", "-a", "a", "--base="), "--base"),
        (("generate", "x", "-b", "base", "-a", "a", "-a", ""), "--adapter"),
        (("inspect", ""), "folder"),
        (("compose", "a", "", "-o", "new"), "adapters"),
        (("compose", "a", "a", "-o", ""), "--output"),
        ((*TRAIN, "-o", ""), "--run.output"),
        ((*TRAIN, "-o", "new", "--adapter.start", ""), "--adapter.start"),
        (("data", "rows.jsonl", "--config", ""), "--config"),
    ],
)
def test_an_empty_word_is_not_the_current_folder(refused: Any, words: tuple[str, ...], name: str) -> None:
    assert refused(*words) == f"error: {name}: the given word is empty; give a value, or leave it out"


def test_an_empty_output_of_a_file(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('[run]\noutput = ""\n')
    assert "run.output: expected a folder, found an empty text" in refused(*TRAIN, "-c", str(tmp_path / "c.toml"))


def test_a_prompt_can_be_empty(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert reparam("generate", "", "-b", "base", "--system", "", "--max-new-tokens", 1) == 0


def test_a_word_that_is_not_utf8(refused: Any) -> None:
    assert refused("generate", "a\udcff", "-b", "base") == "error: a\\udcff: this word of the command line is not UTF-8"


@pytest.mark.parametrize("dtype", ["foo", "nn", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("verb", [("generate", "x"), ("merge", "new"), ("eval", "rows.jsonl")])
def test_an_unknown_dtype(refused: Any, verb: tuple[str, ...], dtype: str) -> None:
    told = refused(*verb, "-a", "a", "-b", "base", "--dtype", dtype)
    assert told == f"error: dtype={dtype!r}: expected one of auto, float32, bfloat16, float16, float64"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("merge", "new", "-a", "a", "--rounding", "nearest"), "--rounding is for --into; add it, or leave"),
        (("compose", "a", "a", "-o", "new", "--bound", "2", "--l1", "0"), "--bound and --l1 are for --search;"),
        (("compose", "a", "a", "-o", "new", "--density", "0.5"), "--density is for --space ties or dare;"),
        (("compress", "a", "new", "--rank", "1", "--max-length", "9"), "--max-length is for --data;"),
        (("inspect", "a", "--survival"), "--survival is for --base;"),
        (("generate", "x", "-b", "base", "--batch-size", "2"), "--batch-size is for --prompts;"),
    ],
)
def test_an_option_without_the_one_that_it_belongs_to(refused: Any, words: tuple[str, ...], sentence: str) -> None:
    assert sentence in refused(*words)


def test_an_option_with_the_one_that_it_belongs_to(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    words = ("--space", "ties", "--density", "0.5", "--rank", "2")
    assert reparam("compose", "a", "run", *words, "-o", tmp_path / "new") == 0


def test_nothing_to_quantize(refused: Any) -> None:
    assert "no targets were given" in refused("quantize", "base", "new", "--targets", ",")


def test_a_long_path_is_named_in_part(refused: Any) -> None:
    told = refused("generate", "x", "-a", "y" * 5000, code=1)
    assert told.startswith("failed: yyy")
    assert told.endswith("...: File name too long")
    assert len(told) < 400


def test_a_run_given_as_the_base(refused: Any) -> None:
    assert "it is a training run: pass it as the adapter" in refused("generate", "x", "-b", "run")


def test_rows_that_are_too_long_where_they_cannot_be_dropped(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text('{"prompt": "a b c d e f", "completion": "c"}\n')
    told = refused("eval", str(tmp_path / "long.jsonl"), "-b", "base", "--max-length", "3")
    assert "cuts off the whole answer of 1 row" in told
    assert told.endswith("keeps all of them")


def test_a_name_on_a_hub_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, value in {
        "HF_HUB_OFFLINE": False,
        "ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_CACHE": str(tmp_path),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(reach, "_answered", False)
    with pytest.raises(
        BaseError, match=r"owner/none: no such folder, and no model of this name is .* cannot be reached"
    ):
        hf_models.load_base("owner/none")
    with pytest.raises(BaseError, match=r"none: no such folder, and no model of this name is .* cannot be reached"):
        hf_models.load_tokenizer("none")
    assert reparam("data", "owner/rows") == 2
    assert "no data set of this name is in the cache of datasets" in capfd.readouterr().err
    (tmp_path / "models--owner--none").mkdir()  # the files come from there, without a request
    with pytest.raises(BaseError, match="owner/none: no causal language model could be loaded"):
        hf_models.load_base("owner/none")
    assert "Retrying" not in capfd.readouterr().err
