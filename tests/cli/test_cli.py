"""The command line as a user meets it: the whole way on a small real model, and one clear sentence for each mistake."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from command import ASSETS, TASK, reparam, train
from forks import Forked
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="session")
def trained(base: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "out"
    assert train(base, rows, output) == 0
    return output


def test_train_leaves_adapter_figures_plot_and_resolved_configuration(trained: Path, base: str) -> None:
    assert {"adapter", "config.toml", "figures.json", "loss.png"} <= {p.name for p in trained.iterdir()}
    figures = json.loads((trained / "figures.json").read_text())
    assert [score["name"] for score in figures["before"]] == ["loss per token", "exact match"]
    assert figures["after"][0]["value"] < figures["before"][0]["value"]
    assert figures["largest change of a logit"] > 0
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_resolved_configuration_reproduces_the_run_bit_for_bit(trained: Path, tmp_path: Path) -> None:
    assert reparam("train", "-c", trained / "config.toml", "-o", tmp_path / "again") == 0
    for name in ("adapter.safetensors", "adapter.json"):
        assert (tmp_path / "again" / "adapter" / name).read_bytes() == (trained / "adapter" / name).read_bytes()


def test_train_says_what_it_trains_and_which_tokens_carry_loss(
    base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(base, rows, tmp_path / "out", "--lora_r", 2, "--target_modules", "q_proj,v_proj") == 0
    out = capsys.readouterr().out
    assert "q_proj" in out
    assert "k_proj" not in out
    assert "everything else is frozen" in out
    assert "⟦" in out  # the log form of the preview
    assert "step 6/6" in out
    assert "its outputs equal those of the trained one bit for bit" in " ".join(out.split())
    settings = json.loads((tmp_path / "out" / "adapter" / "adapter.json").read_text())["settings"]
    assert settings["r"] == 2


def test_generate_eval_merge_inspect_after_train(
    trained: Path, base: str, few: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reparam("generate", "def f(a, b):", "-a", trained, "--compare", "--max-new-tokens", 4) == 0
    out = capsys.readouterr().out
    assert "base" in out
    assert out.count("╭") == 2  # a panel for the base, and one for the adapter

    assert reparam("eval", few, "-a", trained, "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["adapter"][0]["value"] < scores["base"][0]["value"]

    assert reparam("inspect", trained, "-b", base, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert len(summary["sites"]) == 14
    assert all(site["change"] > 0 and site["weight"] > 0 and site["rank"] == 8 for site in summary["sites"])
    assert reparam("inspect", trained) == 0
    assert "q_proj" in capsys.readouterr().out

    merged = tmp_path / "merged"
    assert reparam("merge", merged, "-a", trained) == 0
    assert "share of the update that survives rounding: 1.0000 in float32" in " ".join(capsys.readouterr().out.split())
    assert reparam("eval", few, "-b", merged, "--json") == 0
    assert json.loads(capsys.readouterr().out)["base"][0]["value"] == pytest.approx(
        scores["adapter"][0]["value"], rel=1e-4
    )
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert not [name for name, _ in plain.named_parameters() if "updates" in name]


def test_a_second_call_with_the_same_folder_is_complete_already(trained: Path, base: str, rows: str) -> None:
    before = (trained / "adapter" / "adapter.safetensors").read_bytes()
    assert train(base, rows, trained) == 0
    assert (trained / "adapter" / "adapter.safetensors").read_bytes() == before


def test_text_rows_are_scored_in_bits_per_byte(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join((ASSETS / "tasks" / "reference" / "valid.jsonl").read_text().splitlines()[:6]))
    assert train(base, str(texts), tmp_path / "out", "--data.max_length", 128, "--data.holdout", 0.4) == 0
    assert "bits per byte" in capsys.readouterr().out


SMALL = ("--max_steps", 6, "--save_steps", 100, "--eval_steps", 100, "--batch_size", 2, "--lora_dropout", 0.1)
SMALL += ("--gradient_accumulation_steps", 2, "--data.score_rows", 1)


@pytest.fixture(scope="module")
def whole(base: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert train(base, rows, output, *SMALL) == 0
    return output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_same_command_finishes_as_if_nothing_had_happened(
    number: signal.Signals, code: int, base: str, rows: str, whole: Path, tmp_path: Path
) -> None:
    run = Forked(lambda: train(base, rows, tmp_path, *SMALL))
    run.until("step 3/6  loss")
    run.kill(number)
    ended, rest = run.end()
    assert ended == code, rest + run.errors
    assert "run the same command to continue" in " ".join(rest.split())
    assert not (tmp_path / "adapter").exists()
    assert train(base, rows, tmp_path, *SMALL) == 0
    read = [(folder / "adapter" / "adapter.safetensors").read_bytes() for folder in (tmp_path, whole)]
    assert read[0] == read[1]


MISTAKES = {
    "no base": (["train"], "base.path and data.train must be set"),
    "base missing": (["train", "--base", "./nowhere", "--data", "{rows}"], "no such folder"),
    "base is a file": (["train", "--base", "{rows}", "--data", "{rows}"], "is a file"),
    "data missing": (["train", "--base", "{base}", "--data", "{rows}x"], "rows.jsonl"),
    "unknown option": (["train", "--method.rank", "3"], "No such option"),
    "bad value": (["train", "--base", "{base}", "--data", "{rows}", "--lora_r", "many"], "method.r"),
    "bad rank": (["train", "--base", "{base}", "--data", "{rows}", "--lora_r", "0"], "at least 1"),
    "no such target": (["train", "--base", "{base}", "--data", "{rows}", "--target_modules", "q_prj"], "'q_proj'"),
    "tied target": (["train", "--base", "{base}", "--data", "{rows}", "--target_modules", "embed_tokens"], "untie"),
    "unknown method": (["train", "--base", "{base}", "--data", "{rows}", "--method", "lorra"], "'lora'"),
    "output is base": (["train", "--base", "{base}", "--data", "{rows}", "-o", "{base}"], "folder of the base model"),
    "config missing": (["train", "-c", "none.toml"], "no such file"),
    "unknown optimizer": (["train", "--base", "{base}", "--data", "{rows}", "--optim", "adamx"], "adamx"),
    "adapter missing": (["generate", "x", "-a", "{rows}.d"], "no such folder"),
    "adapter is base": (["generate", "x", "-a", "{base}"], "adapter.json"),
    "neither": (["generate", "x"], "--base"),
    "merge onto base": (["merge", "{base}", "-a", "{trained}"], "folder of the base model"),
    "eval no file": (["eval", "none.jsonl", "-b", "{base}"], "none.jsonl"),
    "inspect nothing": (["inspect", str(TASK)], "adapter.json"),
    "inspect no folder": (["inspect", "none"], "no such folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_clear_error_and_exit_code_2(
    name: str,
    base: str,
    rows: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments, fragment = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    values = {"base": base, "rows": rows, "trained": str(trained)}
    code = reparam(*[argument.format(**values) for argument in arguments])
    captured = capsys.readouterr()
    message = " ".join(captured.err.replace("│", " ").split())
    assert code == 2, captured
    assert fragment in message
    assert "Traceback" not in message
    assert len(message) < 700
    assert not list(tmp_path.iterdir()), "something was written"


def test_a_broken_adapter_file_is_named(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert reparam("generate", "x", "-a", tmp_path / "adapter") == 2
    assert "adapter.safetensors" in capsys.readouterr().err


def test_an_adapter_that_does_nothing_is_an_error(
    base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = train(base, rows, tmp_path / "out", "--learning_rate", "1e-30")
    assert code == 1
    assert "does not change any output" in " ".join(capsys.readouterr().err.split())


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_rows(
    base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(base, rows, tmp_path / "out", "--learning_rate", "1e30", "--save_steps", 1, "--warmup_steps", 0) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert "rows.jsonl:" in message
    assert "nan" in message or "inf" in message
    assert not (tmp_path / "out" / "adapter").exists()


def test_a_damaged_checkpoint_is_skipped_and_named(
    base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(base, rows, tmp_path / "out", "--save_steps", 3) == 0
    done = (tmp_path / "out" / "adapter" / "adapter.safetensors").read_bytes()
    (tmp_path / "out" / "checkpoint-6" / "optimizer.safetensors").unlink()
    capsys.readouterr()
    assert train(base, rows, tmp_path / "out", "--save_steps", 3) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "checkpoint-6" in out
    assert "optimizer.safetensors" in out
    assert "checkpoint-3" in out
    assert (tmp_path / "out" / "adapter" / "adapter.safetensors").read_bytes() == done


def test_tensorboard_gets_the_losses(base: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    assert train(base, rows, tmp_path / "out", "--report_to", "tensorboard") == 0
    assert list((tmp_path / "board").rglob("events.out.tfevents.*"))


def test_help_names_every_key_and_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert reparam("train", "--help") == 0
    out = capsys.readouterr().out
    for text in ("--method.r", "--lora_r", "--learning_rate", "--num_train_epochs", "--output_dir", "(default: 16.0)"):
        assert text in out


def test_two_runs_on_one_folder(base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from reparam.train.checkpoint import RunLock

    started = time.monotonic()
    with RunLock(tmp_path / "out"):
        assert train(base, rows, tmp_path / "out") == 2
    assert time.monotonic() - started < 120
    assert str(os.getpid()) in capsys.readouterr().err
