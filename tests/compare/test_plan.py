"""The plan of a comparison: what it expands to, and one message with every mistake in it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from reparam.compare.command import command
from reparam.compare.data import sides
from reparam.compare.plan import read_plan
from reparam.core.registry import METHODS
from reparam.errors import ConfigError
from reparam.train.config import resolve
from reparam.train.sections import DataConfig

BARE = {"base.path": "model", "data.train": "rows.jsonl"}


def labels(file: Path | None, **more: Any) -> list[str]:
    given = {f"compare.{key}": value for key, value in more.items()}
    return [c.label for c in read_plan(file, {**BARE, **given}).contestants]


def toml(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "plan.toml"
    file.write_text(text)
    return file


def test_methods_times_ranks_times_storages() -> None:
    assert labels(None, methods="lora,dora", ranks="4,8") == ["lora r=4", "lora r=8", "dora r=4", "dora r=8"]
    assert labels(None, methods="lora", ranks="4", storages="dense,nf4") == ["lora dense", "lora nf4"]
    assert labels(None, methods="lora") == ["lora"]


@pytest.mark.filterwarnings("error")
def test_lora_plus_is_known_by_its_setting_not_by_its_name(tmp_path: Path) -> None:
    entries = '[[compare.methods]]\nname = "lora"\nlabel = "first"\n[compare.methods.optim]\nlora_plus = 4\n'
    entries += '[[compare.methods]]\nname = "LoRA+"\nlabel = "second"\n[[compare.methods]]\nname = "lora"\n'
    file = toml(tmp_path, entries)
    plan = read_plan(file, BARE)
    assert plan.reference == "lora"
    assert [plan.config(c, {}).optim.lora_plus for c in plan.contestants] == [4, 16, None]
    plan = read_plan(file, {**BARE, "optim.lora_plus": 8})  # all of them are LoRA+
    assert [plan.config(c, {}).optim.lora_plus for c in plan.contestants] == [4, 8, 8]
    assert plan.reference == "first"


def test_every_method_can_be_named_with_nothing_else_and_every_setting_that_is_listed_is_swept(tmp_path: Path) -> None:
    plain = [name for name, cls in METHODS.items() if _builds(cls)]
    assert labels(None, methods=",".join(plain)) == plain
    file = toml(tmp_path, '[[compare.methods]]\nname = "lora"\nr = [1, 2]\nscaling = ["rslora", "alpha"]\n')
    assert labels(file) == [
        "lora r=1 scaling=rslora",
        "lora r=1 scaling=alpha",
        "lora r=2 scaling=rslora",
        "lora r=2 scaling=alpha",
    ]


def _builds(cls: Any) -> bool:
    try:
        cls()
    except (TypeError, ValueError):
        return False
    return True


def test_an_entry_reaches_other_sections_for_itself_alone(tmp_path: Path) -> None:
    file = toml(
        tmp_path,
        '[[compare.methods]]\nname = "lora"\nlabel = "attention"\nadapter = { targets = ["attention"] }\n'
        '[[compare.methods]]\nname = "lora+"\n[[compare.methods]]\nname = "lora"\n',
    )
    plan = read_plan(file, BARE)
    attention, plus, plain = (plan.config(c, {}) for c in plan.contestants)
    assert (attention.adapter.targets, plain.adapter.targets) == (("attention",), None)
    assert (plus.optim.lora_plus, plain.optim.lora_plus) == (16, None)
    assert plan.reference == "attention"


def test_the_reference_is_plain_lora_where_there_is_one() -> None:
    assert read_plan(None, {**BARE, "compare.methods": "full,lora+,dora,lora"}).reference == "lora"
    assert read_plan(None, {**BARE, "compare.methods": "full,dora"}).reference == "full"


def test_a_rank_for_a_method_that_has_none_is_said(tmp_path: Path) -> None:
    plan = read_plan(None, {**BARE, "compare.methods": "lora,full", "compare.ranks": "2,4"})
    assert [c.label for c in plan.contestants] == ["lora r=2", "lora r=4", "full"]
    assert any("full has no rank" in note for note in plan.notes)
    with pytest.raises(ConfigError, match="full: has no rank, so ranks="):
        read_plan(toml(tmp_path, '[[compare.methods]]\nname = "full"\nranks = [2]\n'), BARE)


def test_adaloras_budget_ends_at_the_rank() -> None:
    plan = read_plan(None, {**BARE, "compare.methods": "adalora", "compare.ranks": "8"})
    settings = plan.config(plan.contestants[0], {}).method.settings()
    assert (settings["target_r"], settings["init_r"]) == (8, 12)


def test_all_mistakes_are_said_at_once(tmp_path: Path) -> None:
    file = toml(
        tmp_path,
        '[compare]\nseed = 3\n[[compare.methods]]\nname = "lorra"\n[[compare.methods]]\nname = "lora"\nrr = 4\n'
        '[[compare.methods]]\nname = "dora"\nr = 0\n[method]\nname = "lora"\n[optim]\nlearning_rate = 1\n',
    )
    with pytest.raises(ConfigError) as error:
        read_plan(file, {"data.train": "rows.jsonl"})
    for part in (
        str(file),
        "unknown key compare.seed (did you mean 'seeds'?)",
        "unknown method 'lorra' (did you mean 'lora'",
        "lora: unknown key method.rr",
        "dora: method",
        "[method] is for a single training run",
        "optim.learning_rate is tuned",
        "base.path must be set",
    ):
        assert part in str(error.value), part


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"compare.methods": "lora", "compare.seeds": "0"}, "seeds=0: expected at least 1"),
        ({"compare.methods": "lora", "compare.rates": "0.1,-1"}, "rates="),
        ({"compare.methods": "lora", "compare.rungs": "0.5,0.25"}, "rungs="),
        ({"compare.methods": "lora", "compare.keep": "0"}, "keep="),
        ({"compare.methods": "lora", "compare.minutes": "0"}, "minutes="),
        ({"compare.methods": "lora,lora"}, "two contestants have the label 'lora'"),
        (
            {"compare.methods": "lora", "compare.reference": "lor"},
            "has the label 'lor' (did you mean 'lora'?)",
        ),
        ({}, "compare.methods: list at least one"),
    ],
)
def test_each_mistake_has_its_sentence(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_plan(None, {**BARE, **given})
    assert message in str(error.value)


def test_the_command_of_a_row_says_the_whole_configuration() -> None:
    """Parsing the printed options as the command line does gives the same configuration."""
    config = resolve(
        None,
        {
            **BARE,
            "base.storage": "nf4",
            "base.double": False,
            "adapter.targets": "q_proj,v_proj",
            "adapter.bias": True,
            "method.name": "lora",
            "method.r": 3,
            "method.rank_pattern": {"q_proj": 2},
            "optim.learning_rate": 3e-4,
            "optim.lora_plus": 16,
            "run.output": "out/a folder",
            "run.seed": 7,
            "run.max_steps": 60,
        },
    )
    words = shlex.split(command(config))
    assert words[:2] == ["reparam", "train"]
    options: dict[str, Any] = {}
    rest = words[2:]
    while rest:
        key = rest.pop(0).removeprefix("--")
        if key.startswith("no-"):
            options[key.removeprefix("no-")] = False
        else:
            options[key] = rest.pop(0) if rest and not rest[0].startswith("--") else True
    assert resolve(None, options) == config


def rows(file: Path, count: int, start: int = 0) -> str:
    lines = [json.dumps({"prompt": f"{i} =", "completion": f" {i}"}) for i in range(start, start + count)]
    file.write_text("\n".join(lines) + "\n")
    return str(file)


def content(file: str) -> list[str]:
    return Path(file).read_text().splitlines()


def test_one_file_gives_three_sides_that_share_nothing(tmp_path: Path) -> None:
    train = rows(tmp_path / "rows.jsonl", 100)
    found = sides(DataConfig(train=train, holdout=0.1), None, tmp_path / "data", rows=50, seed=1)
    parts = [content(file) for file in (found.train, found.valid, found.test)]
    assert [len(part) for part in parts] == [80, 10, 10]
    assert sorted(line for part in parts for line in part) == sorted(content(train))
    assert "20 rows" in found.notes[0]
    again = sides(DataConfig(train=train, holdout=0.1), None, tmp_path / "other", rows=50, seed=1)
    assert content(again.test) == parts[2]
    assert found.stamp() == again.stamp()
    other = sides(DataConfig(train=train, holdout=0.1), None, tmp_path / "third", rows=50, seed=2)
    assert content(other.test) != parts[2]


def test_a_validation_file_is_halved_and_files_that_are_used_whole_stay_where_they_are(tmp_path: Path) -> None:
    train, valid = rows(tmp_path / "train.jsonl", 10), rows(tmp_path / "valid.jsonl", 20, start=50)
    found = sides(DataConfig(train=train, valid=valid), None, tmp_path / "data", rows=50, seed=0)
    assert found.train == train
    assert sorted(content(found.valid) + content(found.test)) == sorted(content(valid))
    whole = sides(DataConfig(train=train, valid=valid), valid, tmp_path / "data", rows=50, seed=0)
    assert (whole.train, whole.valid, whole.test) == (train, valid, valid)
    cut = sides(DataConfig(train=train, valid=valid), valid, tmp_path / "data", rows=5, seed=0)
    assert len(content(cut.test)) == 5
    assert any("5 of 20 test rows" in note for note in cut.notes)
    with pytest.raises(ConfigError, match="too few to split"):
        sides(DataConfig(train=rows(tmp_path / "two.jsonl", 2)), None, tmp_path / "data", rows=50, seed=0)
