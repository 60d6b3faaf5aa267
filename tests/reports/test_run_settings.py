"""Settings of a run that make no sense are refused at once, by key; a run of one step trains."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from command import reparam, train

from reparam import ConfigError
from reparam.train.config import resolve
from reparam.train.sections import DataConfig

WRONG = {
    **dict.fromkeys(("run.batch_size", "run.accumulation", "run.keep", "run.log_every", "data.max_length"), (0, -1)),
    **dict.fromkeys(("run.epochs", "optim.learning_rate"), (0, -0.5, "nan", "inf")),
    **dict.fromkeys(("optim.weight_decay", "optim.max_grad_norm", "optim.warmup"), (-0.1, "nan")),
    **dict.fromkeys(("run.eval_every", "run.save_every", "data.score_rows"), (-1,)),
    "run.max_steps": (0, -2),
    "data.holdout": (0, 1, -0.1, "nan"),
}


@pytest.mark.parametrize("key", WRONG)
def test_a_value_out_of_range_is_named(key: str) -> None:
    for value in WRONG[key]:
        with pytest.raises(ConfigError, match=f"^{key}: .*expected"):
            resolve(None, {key: value})


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"method.norm_axis": "out"}, "method.norm_axis is a setting of dora, and method.name is lora"),
        ({"method.name": "dora", "method.target_r": 4}, "method.target_r is a setting of adalora, .* is dora"),
        ({"method.name": "adalora", "method.r": 4}, "method.r is a setting of lora, dora, .* is adalora"),
        ({"method.name": "lora+", "method.tokens": 4}, "method.tokens is a setting of prefix, prompt, .* is lora"),
        ({"base.block": 16}, "base.block is a setting of the storage nf4, and base.storage is dense"),
        ({"method.rr": 4}, "unknown key method.rr"),
    ],
)
@pytest.mark.filterwarnings("ignore:method.name")
def test_a_setting_of_another_method_names_the_methods_that_have_it(given: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        resolve(None, given)


def test_a_task_is_refused_where_nothing_depends_on_it(
    base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(base, rows, tmp_path / "out") == 0
    for call in (
        ("generate", "def f(x):", "-a", tmp_path / "out", "--task", "foo"),
        ("generate", "def f(x):", "-b", base, "--task", "foo"),
        ("merge", tmp_path / "merged", "-a", tmp_path / "out", "--task", "foo"),
    ):
        assert reparam(*call) == 2
        assert "leave --task out" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "merged").exists()


def test_no_share_is_held_out_beside_a_file() -> None:
    assert DataConfig(valid="rows.jsonl", holdout=0.0).holdout == 0


def test_a_run_of_one_step_trains(base: str, rows: str, tmp_path: Path) -> None:
    assert train(base, rows, tmp_path / "out", "--max_steps", 1) == 0


def test_a_run_that_learned_nothing_leaves_no_adapter(base: str, rows: str, tmp_path: Path) -> None:
    assert train(base, rows, tmp_path / "out", "--learning_rate", "1e-30") == 1
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize(("rate", "worse"), [(0.05, False), (20, True)])
def test_a_diverged_run_says_so(
    rate: float, worse: bool, base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(base, rows, tmp_path / "out", "--learning_rate", rate, "--max_steps", 3) == 0
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert (figures["after"][0]["value"] > figures["before"][0]["value"]) == worse
    assert figures["worse than the base"] is worse
    out = capsys.readouterr().out
    assert ("the run diverged" in out) == worse
    assert (f"{figures['after'][0]['value']:.4f} with the adapter" in out) == worse


def test_an_interrupt_before_the_first_log_leaves_no_empty_plot(
    base: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **more: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("reparam.train.run.Bind.on_step_end", interrupted)
    assert train(base, rows, tmp_path / "out", "--max_steps", 40) == 128 + signal.SIGTERM
    assert (tmp_path / "out" / "checkpoint-1").is_dir()
    assert not (tmp_path / "out" / "loss.png").exists()


@pytest.mark.parametrize(
    ("key", "names", "value"),
    [
        ("run.batch_size", ("--run.batch_size", "--batch_size", "--per_device_train_batch_size"), "0"),
        ("optim.learning_rate", ("--optim.learning_rate", "--lr", "--learning_rate"), "0"),
        ("run.epochs", ("--run.epochs", "--epochs", "--num_train_epochs"), "nan"),
        ("run.keep", ("--run.keep", "--save_total_limit"), "0"),
        ("run.eval_every", ("--run.eval_every", "--eval_steps"), "-5"),
        ("optim.weight_decay", ("--optim.weight_decay", "--weight_decay"), "-1"),
        ("optim.max_grad_norm", ("--optim.max_grad_norm", "--max_grad_norm"), "nan"),
        ("run.log_every", ("--run.log_every", "--logging_steps"), "-1"),
    ],
)
def test_all_names_of_an_option_give_one_sentence(
    key: str, names: tuple[str, ...], value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = set()
    for name in names:
        assert reparam("train", "-o", tmp_path / "out", name, value) == 2
        said.add(" ".join(capsys.readouterr().err.split()))
    assert len(said) == 1
    assert f"error: {key}: " in said.pop()
    assert not (tmp_path / "out").exists()
