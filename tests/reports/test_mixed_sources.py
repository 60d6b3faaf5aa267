"""Several sources: mixed by weight, some rows of each, the same ones for the same seed, and part of the run."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from command import reparam, train
from hypothesis import given
from hypothesis import strategies as st

from reparam.compare.data import sides
from reparam.data.mixture import mixed
from reparam.data.rows import Reading
from reparam.errors import ConfigError, DataError
from reparam.hf.models import load_tokenizer
from reparam.train.config import dump, resolve
from reparam.train.data import read_data
from reparam.train.sections import DataConfig


def write(file: Path, name: str, count: int) -> str:
    rows = [{"prompt": f"{name}{i} ", "completion": "b"} for i in range(count)]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(file)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    place = tmp_path_factory.mktemp("sources")
    return [write(place / "few.jsonl", "few", 20), write(place / "many.jsonl", "many", 100)]


def data(base: str, **settings: object):
    config = resolve(None, {"base.path": base, **{f"data.{key}": value for key, value in settings.items()}})
    return read_data(config, load_tokenizer(base))


@given(
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.01, 10), min_size=4, max_size=4),
    mix=st.sampled_from(["under", "over"]),
    seed=st.integers(0, 5),
)
def test_shares_are_those_of_the_weights(sizes: list[int], weights: list[float], mix: str, seed: int) -> None:
    sources = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    weights = weights[: len(sizes)]
    taken = mixed(sources, weights, mix, seed)
    unit = (min if mix == "under" else max)(size / weight for size, weight in zip(sizes, weights, strict=True))
    for rows, source, weight in zip(taken, sources, weights, strict=True):
        assert abs(len(rows) - weight * unit) <= 0.5 or len(rows) == 1
        assert set(rows) <= set(source)
        counts = np.bincount(rows - source[0], minlength=len(source))
        assert counts.max() - counts.min() <= 1  # no row is repeated before all of them are
    again = mixed(sources, weights, mix, seed)
    assert all(np.array_equal(a, b) for a, b in zip(taken, again, strict=True))


def test_weights_leave_rows_out_or_repeat_them(base: str, files: list[str]) -> None:
    few, many = files
    for mix, expected in (("under", (19, 19)), ("over", (95, 95))):
        found = data(base, train=f"{few},{many}", weights="1,1", mix=mix, holdout=0.05)
        names = [source.rsplit(":", 1)[0] for source in found.train.sources]
        # the seed holds out a few rows of either source, so one or two are missing in each
        assert all(abs(names.count(name) - count) <= 6 for name, count in zip(files, expected, strict=True))
        assert names.count(few) == names.count(many)
        assert not set(found.train.sources) & set(found.valid.sources)
        assert len(found.train.report.lines) == 2


def test_the_lines_on_the_sources_say_what_is_used(base: str, files: list[str], tmp_path: Path) -> None:
    valid = write(tmp_path / "valid.jsonl", "v", 3)
    found = data(base, train=",".join(files), weights="0.75,0.25", valid=valid)
    assert found.train.report.lines == (
        f"{files[0]}: 20 of 20 rows (74% of all)",
        f"{files[1]}: 7 of 100 rows (26% of all)",
    )
    assert found.train.report.rows == 27


def test_rows_of_each_source(files: list[str]) -> None:
    assert [row.prompt for row in Reading(files, most=(2, 3))] == ["few0 ", "few1 ", "many0 ", "many1 ", "many2 "]
    assert len(list(Reading(files, most=(5,)))) == 10
    assert len(list(Reading(files, most=(1000,)))) == 120


def test_what_is_behind_the_last_row_taken_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n{broken\n')
    assert len(list(Reading([file], most=(1,)))) == 1
    with pytest.raises(DataError):
        list(Reading([file], most=(2,)))


def test_held_out_rows_are_those_of_one_file_with_the_same_rows(base: str, files: list[str]) -> None:
    held = set(random.Random(3).sample(range(120), 6))
    config = resolve(None, {"base.path": base, "data.train": ",".join(files), "run.seed": 3})
    found = read_data(config, load_tokenizer(base))
    everything = [row.source for row in Reading(files)]
    assert list(found.valid.sources) == [source for i, source in enumerate(everything) if i in held]
    assert [row.source for row in found.held_out] == list(found.valid.sources)


def test_a_comma_in_a_file_name(tmp_path: Path) -> None:
    file = write(tmp_path / "a,b.jsonl", "x", 2)
    assert DataConfig(train=file).sources() == (file,)
    assert DataConfig(train=("x,y.jsonl", "z.jsonl")).sources() == ("x,y.jsonl", "z.jsonl")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"train": "a.jsonl,b.jsonl", "weights": "1"}, "data.weights: 1 number for 2 sources"),
        ({"train": "a.jsonl", "max_rows": "1,2"}, "data.max_rows: 2 numbers for 1 source "),
        ({"train": "a.jsonl,b.jsonl", "weights": "1,0"}, "data.weights: .*expected finite numbers above 0"),
        ({"train": "a.jsonl,b.jsonl", "weights": "1,nan"}, "data.weights: .*expected finite numbers above 0"),
        ({"train": "a.jsonl", "max_rows": 0}, "data.max_rows: .*expected whole numbers of at least 1"),
        ({"train": "a.jsonl", "mix": "both"}, "data.mix"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        resolve(None, {f"data.{key}": value for key, value in settings.items()})


def test_the_saved_configuration_holds_every_source_with_its_path(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(files[0]).parent)
    config = resolve(None, {"data.train": "few.jsonl,many.jsonl", "data.max_rows": 3})
    (tmp_path / "c.toml").write_text(dump(config, absolute=True))
    again = resolve(tmp_path / "c.toml", {})
    assert again.data.sources() == tuple(files)
    assert again.data.max_rows == (3,)


def test_a_run_with_other_weights_is_another_run(
    base: str, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = ",".join(files)
    assert train(base, named, tmp_path / "out", "--data.weights", "1,1") == 0
    assert "many.jsonl: " in capsys.readouterr().out
    assert train(base, named, tmp_path / "out", "--data.weights", "1,1") == 0
    assert train(base, named, tmp_path / "out", "--data.weights", "1,2") == 2
    assert "data.weights was [1.0, 1.0] and is now [1.0, 2.0]" in capsys.readouterr().err


def test_compare_splits_the_mixture(files: list[str], tmp_path: Path) -> None:
    settings = DataConfig(train=tuple(files), weights=(1.0, 1.0), holdout=0.2)
    found = sides(settings, None, tmp_path, rows=100, seed=0)
    rows = {side: [row.prompt for row in Reading([getattr(found, side)])] for side in ("train", "valid", "test")}
    everything = [prompt for prompts in rows.values() for prompt in prompts]
    assert len(everything) == len(set(everything)) == 40
    assert sum(prompt.startswith("few") for prompt in everything) == 20
    with pytest.raises(ConfigError, match=r"data\.mix"):
        sides(DataConfig(train=tuple(files), weights=(1.0, 1.0), mix="over"), None, tmp_path, rows=100, seed=0)


def test_standard_input_is_read_twice(
    base: str, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(files[1]) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        given = ("--base.path", base, "--data.train", "-", "-o", tmp_path / "out", "--max_steps", 1)
        assert reparam("train", *given, "--data.score_rows", 2) == 0
    assert json.loads((tmp_path / "out/figures.json").read_text())["training rows"] == 95
