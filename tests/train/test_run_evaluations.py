"""Best weights, early stopping, answers at evaluations, NEFTune and length groups, from the command line.

Every run is compared with one that was stopped by a signal and continued: same adapter and same log, bit for bit.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from command import train
from safetensors.torch import load_file

from reparam import ConfigError
from reparam.train.config import resolve

CONSTANT = ("--lr_scheduler_type", "constant", "--optim.warmup", 0)
TIMES = ("runtime", "per_second")


def figures(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "figures.json").read_text())
    return found


def history(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if not k.endswith(TIMES)} for entry in figures(folder)["history"]]


def evaluations(folder: Path) -> dict[int, dict[str, Any]]:
    return {entry["step"]: entry for entry in history(folder) if "eval_loss" in entry}


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def stopped_and_continued(
    step: int, base: str, rows: str, output: Path, monkeypatch: pytest.MonkeyPatch, *more: Any
) -> None:
    """Train; a signal stops the run after a step, and a second call continues it."""

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr("reparam.train.run.Bind.on_step_end", stop)
        assert train(base, rows, output, *more) == 128 + signal.SIGTERM
    assert train(base, rows, output, *more) == 0


WAYS: dict[str, tuple[Any, ...]] = {
    "packed": ("--packing", "--max_length", 128),
    "by length": ("--group_by_length",),
    "noisy": ("--neftune_noise_alpha", 5, "--target_modules", "embed_tokens,lm_head,q_proj", "--adapter.tie"),
    "smooth": ("--optim.label_smoothing", 0.1, "--method.dropout", 0.1),
    "best": ("--run.best", "--learning_rate", 0.3, "--run.samples", 2),
    "best answers": ("--run.metric", "exact_match", "--run.best", "--run.eval_rows", 3),
    "stopped early": ("--run.patience", 1, "--learning_rate", 3.0, "--max_steps", 10),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_continued_run_equals_an_uninterrupted_one(
    way: str, base: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = (*WAYS[way], "--data.score_rows", 0)
    assert train(base, rows, whole, *more) == 0
    stopped_and_continued(3, base, rows, parts, monkeypatch, *more)
    ours, theirs = adapter(parts / "adapter"), adapter(whole / "adapter")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert history(parts) == history(whole)


def test_the_weights_are_those_of_the_best_evaluation(
    base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At this rate the second step raises the loss."""
    out, more = tmp_path / "out", ("--learning_rate", 3, "--max_steps", 2, *CONSTANT)
    assert train(base, rows, out, "--run.best", *more) == 0
    losses = {step: entry["eval_loss"] for step, entry in evaluations(out).items()}
    best = min(losses, key=lambda step: losses[step])
    assert best == 1, losses
    assert figures(out)["best step"] == best
    assert f"the best weights are those of step {best}" in capsys.readouterr().out
    kept = adapter(out / f"checkpoint-{best}" / "adapter")
    assert all(torch.equal(kept[name], value) for name, value in adapter(out / "adapter").items())
    assert train(base, rows, tmp_path / "last", *more) == 0
    last = adapter(tmp_path / "last" / "adapter")
    assert not all(torch.equal(last[name], value) for name, value in kept.items())
    assert figures(tmp_path / "last")["best step"] is None


def test_a_run_that_stopped_early_is_finished(
    base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, more = tmp_path / "out", ("--run.patience", 1, "--learning_rate", 3, "--max_steps", 8, *CONSTANT)
    assert train(base, rows, out, *more) == 0
    said = capsys.readouterr().out
    steps = sorted(evaluations(out))
    best = figures(out)["best step"]
    assert steps[-1] < 8
    assert steps.index(best) == len(steps) - 2
    assert f"stopped early at step {steps[-1]}: 1 evaluation in a row was no better" in said
    before = adapter(out / "adapter")
    assert train(base, rows, out, *more) == 0
    assert f"stopped early at step {steps[-1]}" in capsys.readouterr().out
    assert sorted(evaluations(out)) == steps
    assert all(torch.equal(before[name], value) for name, value in adapter(out / "adapter").items())


def test_of_equal_answers_the_lower_loss_is_better(base: str, rows: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert train(base, rows, out, "--run.best", "--run.metric", "exact_match", "--run.eval_rows", 2) == 0
    found = evaluations(out)
    best = max(found, key=lambda step: (found[step]["eval_exact_match"], -found[step]["eval_loss"]))
    assert figures(out)["best step"] == best


def test_answers_at_each_evaluation(base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert train(base, rows, out, "--run.metric", "exact_match", "--run.samples", 2, "--run.eval_rows", 4) == 0
    found = evaluations(out)
    assert len(found) == 6
    for entry in found.values():
        assert entry["eval_exact_match"] in (0, 0.25, 0.5, 0.75, 1)
        assert [sorted(sample) for sample in entry["samples"]] == [["expected", "given", "question", "source"]] * 2
    said = capsys.readouterr().out
    assert said.count("\nsample  ") == 12
    assert said.count("  exact match 0.") == 6
    after = {entry["name"]: entry["value"] for entry in figures(out)["after"]}
    assert "exact match" in after


def test_the_last_samples_are_the_answers_after_training(base: str, rows: str, tmp_path: Path) -> None:
    """The scores after training answer the same rows with the same weights."""
    out = tmp_path / "out"
    assert train(base, rows, out, "--run.metric", "exact_match", "--run.eval_rows", 3, "--run.samples", 3) == 0
    last = evaluations(out)[6]
    after = {entry["name"]: entry["value"] for entry in figures(out)["after"]}
    assert last["eval_exact_match"] == pytest.approx(after["exact match"])
    assert sum(s["expected"] == s["given"] for s in last["samples"]) == round(3 * after["exact match"])


def test_noise_is_on_the_embeddings_of_training_alone(base: str, rows: str, tmp_path: Path) -> None:
    """With and without noise: other training losses from the first step on, and the same scores before training."""
    more = ("--run.log_every", 1)
    assert train(base, rows, tmp_path / "plain", *more) == 0
    assert train(base, rows, tmp_path / "noisy", "--optim.neftune", 20, *more) == 0
    plain, noisy = (next(e["loss"] for e in history(tmp_path / name)) for name in ("plain", "noisy"))
    assert plain != noisy
    assert figures(tmp_path / "plain")["before"] == figures(tmp_path / "noisy")["before"]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "patience": ({"run.patience": -1}, "run.patience: -1: expected"),
    "samples": ({"run.samples": -1}, "run.samples: -1: expected"),
    "rows": ({"run.eval_rows": 0}, "run.eval_rows: 0: expected"),
    "noise": ({"optim.neftune": 0}, "optim.neftune: 0.0: expected a number above 0"),
    "metric": ({"run.metric": "fluency"}, "run.metric: .*'loss', 'exact_match'"),
    "one kept": ({"run.best": True, "run.keep": 1}, "run.keep: 1 with run.best"),
    "saves": ({"run.patience": 2, "run.save_every": 7, "run.eval_every": 2}, "run.save_every: 7 with run.best"),
}


@pytest.mark.parametrize("case", WRONG)
def test_settings_that_make_no_sense_are_refused(case: str) -> None:
    given, sentence = WRONG[case]
    with pytest.raises(ConfigError, match=sentence):
        resolve(None, given)


def test_groups_of_packs_and_answers_to_texts_are_refused(
    base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert train(base, rows, out, "--packing", "--group_by_length") == 2
    assert "run.group_by_length has no effect on packs" in " ".join(capsys.readouterr().err.split())
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"def f{i}(x): return x + {i}"}) + "\n" for i in range(40)))
    assert train(base, str(texts), out, "--run.samples", 1) == 2
    assert "run.samples: 1: no held-out row is a question with an answer" in " ".join(capsys.readouterr().err.split())
    assert train(base, str(texts), out, "--run.metric", "exact_match") == 2
    assert not out.exists()


def test_settings_of_evaluations_belong_to_the_run(
    base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the best weights, when the run is evaluated changes the adapter; how many answers are printed does not."""
    out = tmp_path / "out"
    assert train(base, rows, out, "--run.best", "--eval_steps", 2) == 0
    assert train(base, rows, out, "--run.best", "--eval_steps", 3) == 2
    assert "run.eval_every was 2 and is now 3" in " ".join(capsys.readouterr().err.split())
    assert train(base, rows, out, "--run.best", "--eval_steps", 2, "--run.samples", 1) == 0
    assert train(base, rows, tmp_path / "last", "--eval_steps", 2) == 0
    assert train(base, rows, tmp_path / "last", "--eval_steps", 3) == 0
