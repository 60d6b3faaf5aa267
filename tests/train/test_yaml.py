"""YAML in place of TOML: the same configuration, the numbers of YAML 1.2, and one clear sentence for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w
import yaml

from reparam.compare.plan import read_plan
from reparam.errors import ConfigError
from reparam.train.config import resolve
from reparam.train.documents import LARGEST, read_tables, read_yaml

TABLES = {
    "base": {"path": "model", "storage": "nf4", "block": 32},
    "data": {"train": "rows.jsonl", "max_length": 512},
    "adapter": {"targets": ["q_proj", "re:.*up_proj"], "bias": True},
    "method": {"name": "lora", "r": 4, "rank_pattern": {"q_proj": 2}},
    "optim": {"learning_rate": 2e-05, "warmup": 0.1},
    "run": {"epochs": 2, "loggers": ["tensorboard"], "gradient_checkpointing": True},
}


def written(folder: Path, text: str, name: str = "run.yaml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


@pytest.mark.parametrize("name", ["run.yaml", "run.yml", "RUN.YAML"])
def test_yaml_gives_the_configuration_that_toml_gives(name: str, tmp_path: Path) -> None:
    file = written(tmp_path, yaml.safe_dump(TABLES), name)
    toml = written(tmp_path, tomli_w.dumps(TABLES), "run.toml")
    assert resolve(file, {}) == resolve(toml, {})


def test_a_plan_may_be_yaml(tmp_path: Path) -> None:
    common = {key: TABLES[key] for key in ("base", "data")}
    compare = {"methods": [{"name": "lora", "r": [2, 4]}, {"name": "dora"}], "rates": [1e-3, 1e-2], "seeds": 2}
    tables = common | {"compare": compare}
    file, toml = written(tmp_path, yaml.safe_dump(tables)), written(tmp_path, tomli_w.dumps(tables), "plan.toml")
    assert read_plan(file, {}) == read_plan(toml, {})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-1.", -1.0),
        ("012", 12),
        ("1_000", 1000),
        ("0x1F", 31),
        ("0o17", 15),
        ("1:30", "1:30"),
        ("on", "on"),
        ("no", "no"),
        ("True", True),
        ("false", False),
        ("~", None),
        ("", None),
        ("2024-01-02", "2024-01-02"),
        ("'1'", "1"),
        ("-.inf", float("-inf")),
        ("[a, 1, {b: 2}]", ["a", 1, {"b": 2}]),
        ("<<", "<<"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object, tmp_path: Path) -> None:
    assert read_yaml(written(tmp_path, f"key: {text}\n")) == {"key": value}


def test_what_has_no_value_counts_as_not_given(tmp_path: Path) -> None:
    assert read_tables(written(tmp_path, "base:\ndata:\n  valid: null\n  max_length: 5\n")) == {
        "data": {"max_length": 5}
    }
    assert read_tables(written(tmp_path, "# nothing\n")) == {}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("run:\n  seed: 1\n  seed: 2\n", ":3:3: not valid YAML: the key 'seed' occurs twice"),
        ("run: &a {seed: 1}\nbase: *a\n", ":1:6: not valid YAML: anchors (&, *) are not read"),
        ("run: !!python/object/apply:os.system ['true']\n", ":1:6: not valid YAML: the tag 'python/object/apply:os"),
        ("run: !!binary aGk=\n", "the tag 'binary' is not read"),
        ("run:\n  1: 2\n", ":2:3: not valid YAML: the key 1 is not a text"),
        ("run: {seed: 1\n", "not valid YAML: "),
        ("a: 1\n---\nb: 2\n", "not valid YAML: "),
        ("- a\n", "holds no keys"),
        ("x" * 10, "holds no keys"),
        ("a: " + "[" * 3000, "not valid YAML: "),
        ("a: " + "1" * 5000, "not valid YAML: "),
        ("a: b\x07\n", "not valid YAML: "),
        ("learning_rate: 1e-4\n", "keys outside a section: learning_rate; put them under one of [base]"),
        ("run: 5\n", "keys outside a section: run"),
        ("#" * (LARGEST + 1), "more than the 1,048,576 that a YAML file can have"),
    ],
)
def test_a_mistake_gets_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as told:
        read_tables(written(tmp_path, text))
    assert sentence in str(told.value)
    assert str(tmp_path / "run.yaml") in str(told.value)


@pytest.mark.parametrize("name", ["run.yaml", "run.toml"])
def test_bytes_that_are_no_text_and_missing_files(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    with pytest.raises(ConfigError, match="no such file"):
        read_tables(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=f"{name}: the file is UTF-16; save it as UTF-8"):
        read_tables(file)
    file.unlink()
    file.mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        read_tables(file)
