"""`--engine` of eval and generate. The judge is the same command without it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import reparam, train


@pytest.fixture(scope="module")
def run(base, rows, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("run") / "first"
    assert train(base, rows, place) == 0
    return place


def test_eval_with_the_engine_gives_the_scores_of_eval(run: Path, few: str, capsys: pytest.CaptureFixture) -> None:
    found = []
    for more in ([], ["--engine"]):
        assert reparam("eval", few, "--adapter", run, "--json", *more) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    assert len(found[0]["adapter"]) == 2  # a loss, and exact match


def test_generate_with_the_engine_gives_the_answers_of_generate(run: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"def f{n}(" + "a, " * n}) + "\n" for n in range(9)))
    found = []
    for name, more in (("plain", []), ("engine", ["--engine"])):
        out = tmp_path / f"{name}.jsonl"
        assert reparam("generate", "--prompts", prompts, "-o", out, "-a", run, "--compare", "--raw", *more) == 0
        found.append(out.read_text())
    assert found[0] == found[1]
    assert all(len(json.loads(line)["answers"]) == 2 for line in found[0].splitlines())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["def f("], "--engine is for --prompts"),
        (["--prompts", "x.jsonl", "--temperature", "0.5"], "--temperature would have no effect"),
        (["--prompts", "x.jsonl", "--top-p", "0.5", "--top-k", "3"], "--top-p and --top-k would have no effect"),
    ],
)
def test_what_the_engine_cannot_do_is_refused(
    given: list[str], message: str, run: Path, capsys: pytest.CaptureFixture
) -> None:
    assert reparam("generate", *given, "-a", run, "--engine") == 2
    assert message in " ".join(capsys.readouterr().err.split())
