"""GRPO through TRL: its losses with PEFT's LoRA, resumed bit for bit, and what is said about reward functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import TASK, reparam
from datasets import Dataset
from rich.console import Console
from safetensors.torch import load_file
from stopping import Stopping
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_settings import PLAIN

import reparam as library
from reparam.train.config import Config, resolve
from reparam.train.run import train as run
from reparam.train.show import Show

STEPS, RATE, R, SAMPLES, NEW = 3, 0.02, 4, 4, 6
REWARD = '''
def score(completions, answer, **others):
    """More for answers with letters of the expected one."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(letter in text for letter in want) / len(want) for text, want in zip(texts, answer)]
'''
KEYS = ("loss", "reward", "reward_std", "completions/mean_length", "entropy", "grad_norm")


def chats(count: int) -> list[dict[str, Any]]:
    lines = (TASK / "train.jsonl").read_text().splitlines()[:count]
    return [{"messages": json.loads(line)["messages"]} for line in lines]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    rows, code = tmp_path / "rows.jsonl", tmp_path / "rewards.py"
    rows.write_text("".join(json.dumps(row) + "\n" for row in chats(6)))
    code.write_text(REWARD)
    return rows, code


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")  # TRL's own trainer sends none then


def config(base: str, folder: Path, files: tuple[Path, Path], **more: Any) -> Config:
    settings = {
        "base.path": base,
        "data.train": str(files[0]),
        "data.valid": str(files[0]),
        "data.score_rows": 3,
        "method.r": R,
        "optim.learning_rate": RATE,
        "optim.schedule": "constant",
        "optim.warmup": 0,
        "prefer.reward": f"{files[1]}:score",
        "prefer.samples": SAMPLES,
        "prefer.new_tokens": NEW,
        "run.objective": "grpo",
        "run.batch_size": 4,
        "run.accumulation": 2,
        "run.max_steps": STEPS,
        "run.log_every": 1,
        "run.eval_every": 100,
        "run.output": str(folder),
    }
    return resolve(None, settings | more)


def history(folder: Path) -> list[dict[str, float]]:
    found = json.loads((folder / "figures.json").read_text())["history"]
    kept = [entry for entry in found if "loss" in entry]
    return [{k: v for k, v in e.items() if "runtime" not in k and "second" not in k and "time" not in k} for e in kept]


def trl_history(base: str, folder: Path, code: Path, *, beta: float) -> list[dict[str, float]]:
    from peft import PeftModel
    from trl import GRPOConfig, GRPOTrainer

    from reparam.train.reward import Reward

    adapter = library.attach(AutoModelForCausalLM.from_pretrained(base), library.LoRA(r=R))
    adapter.save(folder / "start", format="peft")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "start", is_trainable=True)
    rows = [{"prompt": chat["messages"][:1], "answer": chat["messages"][1]["content"]} for chat in chats(6)]
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": RATE,
        **PLAIN,
        "num_generations": SAMPLES,
        "max_completion_length": NEW,
        "beta": beta,
    }
    made = GRPOTrainer(
        model,
        reward_funcs=Reward(f"{code}:score"),
        args=GRPOConfig(str(folder / "trl"), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    made.train()
    return [entry for entry in made.state.log_history if "loss" in entry]


@pytest.mark.parametrize("beta", [None, 0.5])
def test_the_losses_are_those_of_trl_with_peft(
    base: str, tmp_path: Path, files: tuple[Path, Path], beta: float | None
) -> None:
    assert run(config(base, tmp_path / "out", files, **{"optim.beta": beta}), show=Show(Console(quiet=True)))
    ours, theirs = history(tmp_path / "out"), trl_history(base, tmp_path, files[1], beta=beta or 0.0)
    assert len(ours) == len(theirs) == STEPS
    keys = KEYS if beta is None else (*KEYS, "kl")
    for own, other in zip(ours, theirs, strict=True):
        for key in keys:
            assert own[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), (key, own["step"])
    assert any(entry["reward_std"] > 0 for entry in ours)


def test_a_resumed_run_equals_an_uninterrupted_one(base: str, tmp_path: Path, files: tuple[Path, Path]) -> None:
    """The run stops in its second epoch; an epoch has three steps."""
    more = {"run.max_steps": 7, "run.save_every": 100}
    whole, parts = (config(base, tmp_path / name, files, **more) for name in ("whole", "parts"))
    quiet = Console(quiet=True)
    assert run(whole, show=Show(quiet)).signal is None
    assert run(parts, show=Stopping(quiet, 5)).signal is not None
    assert run(parts, show=Show(quiet)).signal is None
    first, second = (load_file(tmp_path / name / "adapter" / "adapter.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert history(tmp_path / "whole") == history(tmp_path / "parts")


def test_a_run_ends_with_the_weights_of_the_best_mean_reward(
    base: str, tmp_path: Path, files: tuple[Path, Path]
) -> None:
    more = {"run.metric": "mean_reward", "run.best": True, "run.eval_every": 1, "optim.learning_rate": 0.3}
    run(config(base, tmp_path / "out", files, **more), show=Show(Console(quiet=True)))
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    found = {e["step"]: e["eval_mean_reward"] for e in figures["history"] if "eval_mean_reward" in e}
    assert sorted(found) == [1, 2, 3]
    assert figures["best step"] == max(found, key=lambda step: (found[step], -step))
    assert figures["after"][0]["value"] == pytest.approx(found[figures["best step"]])


def test_mistakes(base: str, tmp_path: Path, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    rows, code = files
    broken, wrong, toml = tmp_path / "broken.py", tmp_path / "wrong.py", tmp_path / "run.toml"
    broken.write_text("import nothing_of_this_name\n")
    wrong.write_text("def score(completions):\n    return [1.0]\n\ndef fail(completions):\n    return 1 / 0\n")
    toml.write_text(f'[run]\nobjective = "grpo"\n[prefer]\nreward = "{code}:score"\n')
    start = ["train", "--base.path", base, "--data.train", rows, "--max_steps", 1]
    start += ["--batch_size", 4, "--num_generations", 4, "--max_completion_length", 3]
    for number, (more, code_, said) in enumerate(
        (
            (["--objective", "grpo"], 2, "prefer.reward must be set for grpo"),
            (["--objective", "grpo", "--reward", "rewards"], 2, "expected FILE.py:function"),
            (["--objective", "grpo", "--reward", f"{tmp_path}/no.py:score"], 2, "no such file"),
            (["--objective", "grpo", "--reward", f"{code}:scores"], 2, "has no function 'scores'"),
            (["--objective", "grpo", "--reward", f"{broken}:score"], 2, "cannot be imported: ModuleNotFoundError"),
            (
                ["--objective", "grpo", "--reward", f"{code}:score", "--num_generations", 3],
                2,
                "is no multiple of the 3",
            ),
            (
                ["--objective", "grpo", "--reward", f"{code}:score", "--run.best"],
                2,
                "the loss of grpo does not tell which weights are better",
            ),
            (["--reward", f"{code}:score"], 2, "prefer.reward: the objective sft does not use it"),
            (["--config", toml], 2, "taken from the command line alone"),
            (
                ["--objective", "grpo", "--reward", f"{wrong}:fail"],
                1,
                "the reward function fail failed: ZeroDivisionError",
            ),
            (["--objective", "grpo", "--reward", f"{wrong}:score"], 1, "it must return one finite number for each"),
        )
    ):
        assert reparam(*start, *more, "-o", tmp_path / f"out-{number}") == code_, more
        error = " ".join(capsys.readouterr().err.split())
        assert said in error, error
        assert "Traceback" not in error


def test_the_command(base: str, tmp_path: Path, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    rows, code = files
    start = ["train", "--base.path", base, "--data.train", rows, "--data.valid", rows, "-o", tmp_path / "out"]
    start += ["--max_steps", 1, "--batch_size", 4, "--num_generations", 4, "--max_completion_length", 3, "--lr", 0.05]
    start += ["--objective", "grpo", "--reward", f"{code}:score"]
    assert reparam(*start) == 0
    assert "mean reward" in capsys.readouterr().out
    assert "reward" not in (tmp_path / "out" / "config.toml").read_text()
    code.write_text(REWARD + "# another reward\n")
    assert reparam(*start, "--max_steps", 2) == 2
    assert "the content of prefer.reward has changed" in " ".join(capsys.readouterr().err.split())
