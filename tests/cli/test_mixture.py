"""Mixtures on the command line: rows with tasks, experts from folders, tasks that are given or missing."""

import json
from pathlib import Path

import pytest
import torch
from command import reparam, train
from transformers import AutoModelForCausalLM

import reparam as library

TASKS = ("length", "name")


@pytest.fixture(scope="module")
def by_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows whose questions do not reveal which of two answers is wanted."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = []
    for i in range(40):
        word = f"def f{i}(a, b):"
        lines.append({"prompt": word, "completion": " two", "task": "length"})
        lines.append({"prompt": word, "completion": " f", "task": "name"})
    for name in ("all", *TASKS):
        chosen = [line for line in lines if name in ("all", line["task"])]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in chosen))
    return folder


@pytest.fixture(scope="module")
def gated(base: str, by_task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("gated") / "out"
    more = ["--method", "task_gated", "--method.n", 4, "--method.r", 8, "--max_steps", 60]
    assert train(base, str(by_task / "all.jsonl"), output, *more) == 0
    return output


def test_rows_say_their_tasks_and_the_adapter_keeps_their_names(gated: Path, by_task: Path) -> None:
    settings = json.loads((gated / "adapter/adapter.json").read_text())["settings"]
    assert settings["tasks"] == ["length", "name"]
    figures = json.loads((gated / "figures.json").read_text())
    assert figures["after"][0]["value"] < figures["before"][0]["value"]


def test_the_task_is_named_where_the_adapter_is_used(
    gated: Path, by_task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {}
    for task in TASKS:
        arguments = ["def f3(a, b):", "--adapter", gated, "--task", task, "--raw", "--max-new-tokens", 1]
        assert reparam("generate", *arguments) == 0
        answers[task] = capsys.readouterr().out.strip()
    assert answers == {"length": "two", "name": "f"}
    assert reparam("eval", by_task / "all.jsonl", "--adapter", gated, "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["adapter"][1]["name"] == "exact match"

    merged = {}
    for task in TASKS:
        assert reparam("merge", tmp_path / task, "--adapter", gated, "--task", task) == 0
        merged[task] = AutoModelForCausalLM.from_pretrained(tmp_path / task)
    ids = torch.arange(8)[None]
    model = AutoModelForCausalLM.from_pretrained(json.loads((gated / "figures.json").read_text())["base"])
    library.load(model, gated / "adapter")
    for task in TASKS:
        with torch.no_grad(), library.context(model, tasks=task):
            apart = (model(ids).logits - merged[task](ids).logits).abs().max()
        assert apart < 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "def f(a):", "--raw"], "this forward pass needs one task, and no task was given"),
        (["generate", "def f(a):", "--raw", "--task", "lenght"], "'lenght' is not one of the 2 tasks"),
        (["merge", "OUT"], "router 'task_embedding' reads the task: merging needs one task"),
        (["merge", "OUT", "--task", "third"], "'third' is not one of the 2 tasks"),
        (["eval", "ROWS"], 'no "task", which this method depends on'),
    ],
)
def test_a_task_that_is_missing_or_unknown_is_one_sentence(
    arguments: list[str],
    message: str,
    gated: Path,
    rows: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = tmp_path / "plain.jsonl"
    lines = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    plain.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "task"}) + "\n" for line in lines))
    places = {"OUT": str(tmp_path / "merged"), "ROWS": str(plain)}
    assert reparam(*[places.get(a, a) for a in arguments], "--adapter", gated) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "merged").exists()


def test_gates_over_finished_adapters(base: str, by_task: Path, tmp_path: Path) -> None:
    for rank, task in enumerate(TASKS, start=2):
        assert train(base, str(by_task / f"{task}.jsonl"), tmp_path / task, "--method.r", rank) == 0
    folders = f"{tmp_path / TASKS[0]},{tmp_path / TASKS[1] / 'adapter'}"  # a run, and an adapter
    data = str(by_task / "all.jsonl")
    assert train(base, data, tmp_path / "mole", "--method", "mole", "--method.experts", folders) == 0
    kept = json.loads((tmp_path / "mole/adapter/adapter.json").read_text())["settings"]
    assert kept["experts"] == list(TASKS)
    assert {tuple(ranks) for ranks in kept["ranks"].values()} == {(2, 3)}
    figures = json.loads((tmp_path / "mole/figures.json").read_text())
    assert figures["trained parameters"] == 2 * 2 * 32  # a gate for each of two blocks, of two experts
    assert "loss_mole_balance" in figures["history"][0]
