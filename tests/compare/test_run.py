"""A whole comparison on a small real model: it resumes, it can be repeated by hand, it stops in time and in order."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hearing import Heard
from models import save_base
from rich.console import Console

from reparam.cli import main
from reparam.compare import serving
from reparam.compare.plan import Plan, read_plan
from reparam.compare.run import TUNING, compare
from reparam.compare.trial import Outcome, Trial, perform
from reparam.compare.workers import Late, here
from reparam.core.progress import listening
from reparam.errors import ConfigError, Stopped

TASK = Path(__file__).parents[2] / "assets" / "tasks" / "signatures"
STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def _short_measurements() -> Iterator[None]:
    """Decode a few tokens once to measure latency."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "TOKENS", 2)
        patch.setattr(serving, "ROUNDS", 1)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base") / "model"
    save_base(folder, tie_word_embeddings=True)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small files of training, tuning and test rows."""
    folder, files = tmp_path_factory.mktemp("data"), {}
    for side, count in (("train", 40), ("valid", 4), ("test", 5)):
        files[side] = str(folder / f"{side}.jsonl")
        lines = sorted((TASK / f"{side}.jsonl").read_text().splitlines(), key=len)[:count]  # with short answers
        Path(files[side]).write_text("\n".join(lines) + "\n")
    return files


def planned(base: str, data: dict[str, str], output: Path, **more: Any) -> Plan:
    settings: dict[str, Any] = {
        "base.path": base,
        "data.train": data["train"],
        "data.valid": data["valid"],
        "compare.test": data["test"],
        "compare.methods": "lora,bitfit",
        "compare.seeds": 2,
        "compare.rates": "0.005,0.05",
        "compare.rungs": "0.5",
        "compare.metric": "loss",
        "run.max_steps": STEPS,
        "run.batch_size": 4,
        "run.output": str(output),
    }
    settings["compare.methods"] = [{"name": "lora", "r": 2}, {"name": "bitfit", "create": True}]
    return read_plan(None, {**settings, **{key.replace("__", "."): value for key, value in more.items()}})


class Recorder:
    """Runs trials in this process and records them; from the `stop`-th on, time is up or a signal arrives."""

    def __init__(self, *, late_at: int | None = None, signal_at: int | None = None) -> None:
        self.trials: list[Trial] = []
        self.late_at, self.signal_at = late_at, signal_at

    def __call__(self, trials: Sequence[Trial], late: Late) -> Iterator[Outcome]:
        for trial in trials:
            if len(self.trials) == self.late_at:
                return
            if len(self.trials) == self.signal_at:
                raise Stopped(15)
            self.trials.append(trial)
            yield perform(trial)


def run(plan: Plan, worker: Any = here) -> dict[str, Any]:
    compare(plan, workers=worker, console=Console(quiet=True))
    return json.loads((Path(plan.output) / "results.json").read_text())


@pytest.fixture(scope="module")
def whole(
    base: str, data: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Plan, Recorder, dict[str, Any]]:
    plan = planned(base, data, tmp_path_factory.mktemp("compare") / "out")
    recorder = Recorder()
    with listening(heard := Heard()):
        found = run(plan, recorder)
    assert heard.waits["tuning, rung 1 of 1, 2 steps"] == (4, 4)
    assert heard.waits["seed 1, 4 steps"] == (2, 2)
    return plan, recorder, found


def test_tuning_comes_first_rate_by_rate_then_seed_by_seed(whole: tuple[Plan, Recorder, dict[str, Any]]) -> None:
    _, recorder, found = whole
    order = [(t.tuning, t.steps, t.rate if t.tuning else None, t.seed, t.label) for t in recorder.trials]
    tuned = [(True, 2, rate, TUNING, label) for rate in (0.005, 0.05) for label in ("lora", "bitfit")]
    scored = [(False, STEPS, None, seed, label) for seed in (0, 1) for label in ("lora", "bitfit")]
    assert order == tuned + scored
    for entry in found["tuning"]:
        losses = entry["losses"]["2"]
        assert entry["rate"] == float(min(losses, key=losses.get))
        assert next(r["rate"] for r in found["rows"] if r["label"] == entry["label"]) == entry["rate"]


def test_the_report_has_every_figure_of_every_contestant(whole: tuple[Plan, Recorder, dict[str, Any]]) -> None:
    plan, _, found = whole
    assert (found["metric"], found["reference"], found["missing"]) == ("loss per token", "lora", [])
    assert {row["label"] for row in found["rows"]} == {"lora", "bitfit"}
    for row in found["rows"]:
        values = [scores["loss per token"]["value"] for scores in row["seeds"].values()]
        assert row["score"]["mean"] == pytest.approx(sum(values) / 2)
        assert row["score"]["low"] < row["score"]["mean"] < row["score"]["high"]
        assert row["step_seconds"] > 0
        assert row["peak_bytes"] > 4 * row["parameters"]
        assert row["serving"]["merged"] == "yes"
        assert row["serving"]["adapter_bytes"] > 4 * row["parameters"]
        assert [step for step, _ in row["curve"]] == list(range(1, STEPS + 1))
        assert "exact match" in row["others"]
    lora, bitfit = (next(r for r in found["rows"] if r["label"] == label) for label in ("lora", "bitfit"))
    assert lora["difference"] is None
    assert bitfit["difference"]["mean"] == pytest.approx(bitfit["score"]["mean"] - lora["score"]["mean"])
    assert found["base"]["loss per token"]["value"] > lora["score"]["mean"]
    assert lora["label"] in (Path(plan.output) / "report.html").read_text()


def test_a_second_call_runs_nothing_and_finds_the_same(whole: tuple[Plan, Recorder, dict[str, Any]]) -> None:
    plan, _, found = whole
    again = Recorder()
    assert run(plan, again) == found
    assert again.trials == []


def test_the_command_of_a_row_makes_its_adapter_and_prints_its_score(
    whole: tuple[Plan, Recorder, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, _, found = whole
    row = next(r for r in found["rows"] if r["label"] == "lora")
    words = shlex.split(row["command"])
    words[words.index("--run.output") + 1] = str(tmp_path / "again")
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    figures = json.loads((tmp_path / "again" / "figures.json").read_text())
    assert figures["after"][0] == row["seeds"]["0"]["loss per token"]
    kept = next(Path(plan.output).glob("runs/lora-*-4-0-*/adapter"))
    for name in ("adapter.safetensors", "adapter.json"):
        assert (tmp_path / "again" / "adapter" / name).read_bytes() == (kept / name).read_bytes()


def test_a_changed_plan_repeats_only_what_changed(
    whole: tuple[Plan, Recorder, dict[str, Any]], base: str, data: dict[str, str], tmp_path: Path
) -> None:
    plan, _, _ = whole
    shutil.copytree(plan.output, tmp_path / "out")
    more, recorder = planned(base, data, tmp_path / "out", compare__seeds=3), Recorder()
    found = run(more, recorder)
    assert [(t.seed, t.label) for t in recorder.trials] == [(2, "lora"), (2, "bitfit")]
    assert found["seeds"] == [0, 1, 2]
    Path(tmp_path / "rows.jsonl").write_text(Path(data["test"]).read_text().replace("self", "this"))
    other = Recorder(late_at=1)
    run(planned(base, {**data, "test": str(tmp_path / "rows.jsonl")}, tmp_path / "out"), other)
    assert len(other.trials) == 1  # the rows are others


def without(whole: Plan, output: Path, runs: str, base: str, data: dict[str, str]) -> Plan:
    """The plan for a copy of the whole comparison in which these runs were not made."""
    shutil.copytree(whole.output, output)
    for name in ("results.json", "report.html"):
        (output / name).unlink()
    removed = list((output / "runs").glob(runs))
    assert removed
    for folder in removed:
        shutil.rmtree(folder)
    return planned(base, data, output)


def test_a_signal_leaves_a_report_and_the_next_call_goes_on(
    whole: tuple[Plan, Recorder, dict[str, Any]], base: str, data: dict[str, str], tmp_path: Path
) -> None:
    plan = without(whole[0], tmp_path / "out", "*-1-*", base, data)
    stopped = compare(plan, workers=Recorder(signal_at=0), console=Console(quiet=True))
    assert stopped.signal == 15
    half = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "SIGTERM" in half["missing"][0]
    rest = Recorder()
    found = run(plan, rest)
    assert len(rest.trials) == 2
    scores = {row["label"]: row["score"] for row in found["rows"]}
    assert scores == {row["label"]: row["score"] for row in whole[2]["rows"]}


def test_a_seed_that_not_all_have_ended_is_no_part_of_the_table(
    whole: tuple[Plan, Recorder, dict[str, Any]], base: str, data: dict[str, str], tmp_path: Path
) -> None:
    found = run(without(whole[0], tmp_path / "out", "bitfit-*-1-*", base, data), Recorder(late_at=0))
    assert found["seeds"] == [0]
    assert "Seed 1 was not finished" in found["missing"][0]
    assert "one seed" in found["recommendation"]


def test_no_run_starts_when_the_minutes_are_spent(base: str, data: dict[str, str], tmp_path: Path) -> None:
    found = run(planned(base, data, tmp_path / "out", compare__minutes=1e-9))
    assert found["rows"] == []
    assert "not made" in found["missing"][0]
    assert "nothing to compare yet" in found["recommendation"]


def test_contestants_over_the_parameter_budget_are_left_out(base: str, data: dict[str, str], tmp_path: Path) -> None:
    methods = [{"name": "lora", "r": 1}, {"name": "full"}]
    plan = planned(
        base,
        data,
        tmp_path / "out",
        compare__methods=methods,
        compare__parameters=5000,
        compare__seeds=1,
        compare__rates="0.005",
    )
    found = run(plan)
    assert [row["label"] for row in found["rows"]] == ["lora"]
    assert "more than compare.parameters" in found["stopped"]["full"]
    with pytest.raises(ValueError, match="every contestant trains more"):
        run(planned(base, data, tmp_path / "none", compare__parameters=1))


def test_a_hopeless_contestant_is_stopped_after_a_rung(base: str, data: dict[str, str], tmp_path: Path) -> None:
    """LoRA of rank 8 with a tiny scale has a much higher loss and more parameters than others."""
    methods = [{"name": "lora", "r": 2}, {"name": "lora", "label": "mute", "r": 8, "alpha": 1e-6}]
    only = {"compare__keep": 0.5, "compare__least": 1, "compare__seeds": 1, "compare__rates": "0.05"}
    plan = planned(base, data, tmp_path / "out", compare__methods=methods, **only)
    found = run(plan)
    assert "place 2 of 2" in found["stopped"]["mute"]
    assert [row["label"] for row in found["rows"]] == ["lora"]


def test_a_run_that_diverges_is_a_result(base: str, data: dict[str, str], tmp_path: Path) -> None:
    plan = planned(
        base, data, tmp_path / "out", compare__rates="1e30,0.005", compare__seeds=1, optim__max_grad_norm=1e9,
        compare__methods=[{"name": "lora", "r": 2}],
    )  # fmt: skip
    found = run(plan)
    tried = next(entry for entry in found["tuning"] if entry["label"] == "lora")["losses"]["2"]
    assert tried["1e+30"] is None
    assert found["rows"][0]["rate"] == 0.005


def test_what_does_not_fit_the_model_is_said_before_anything_is_trained(
    base: str, data: dict[str, str], tmp_path: Path
) -> None:
    methods = [
        {"name": "lora", "adapter": {"targets": ["nothing"]}},
        {"name": "bitfit"},
        {"name": "lora", "label": "fine"},
    ]
    recorder = Recorder()
    with pytest.raises(ConfigError) as error:
        run(planned(base, data, tmp_path / "out", compare__methods=methods), recorder)
    assert "lora: " in str(error.value)
    assert "bitfit: " in str(error.value)
    assert "fine" not in str(error.value)
    assert recorder.trials == []
    with pytest.raises(ConfigError, match=r"compare.metric: rows with answers have no metric .bits."):
        run(planned(base, data, tmp_path / "out", compare__metric="bits"))


def test_the_verb_reads_a_file_with_options_on_top(
    base: str, data: dict[str, str], tmp_path: Path, capsys: Any
) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(
        f'[base]\npath = "{base}"\n[data]\ntrain = "{data["train"]}"\nvalid = "{data["valid"]}"\n'
        f"[run]\nmax_steps = 2\nbatch_size = 2\n[compare]\nrates = [0.01]\nrungs = [0.5]\nseeds = 5\n"
        f'[[compare.methods]]\nname = "lora"\nr = 1\n'
    )
    for expected in (0, 0):  # and again, from the plan that the first call wrote
        code = _reparam("compare", file, "--seeds", 1, "-o", tmp_path / "out")
        assert code == expected
        out = " ".join(capsys.readouterr().out.split())
        assert "No contestant is better than the base without an adapter (exact match 0.000" in out
        assert "report.html" in out
        file = tmp_path / "out" / "plan.toml"
    assert _reparam("compare", "--methods", "lora", "--workers", "clouds") == 2
    assert _reparam("compare", file, "--workers", "clouds") == 2
    assert "expected one of here, ray" in capsys.readouterr().err


def _reparam(*arguments: object) -> Any:
    before, sys.argv = sys.argv, ["reparam", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = before
    return ended.value.code
