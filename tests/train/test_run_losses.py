"""`run.chunked_loss` and `optim.label_smoothing`, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import train

from reparam import ConfigError
from reparam.train.config import resolve
from reparam.train.trainer import Trainer


def history(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "figures.json").read_text())["history"]
    return found


def losses(folder: Path) -> torch.Tensor:
    return torch.tensor([e.get("loss", e.get("eval_loss")) for e in history(folder)], dtype=torch.float64)


@pytest.mark.parametrize(
    "more", [(), ("--run.accumulation", 2), ("--target_modules", "q_proj,lm_head", "--base.untie")], ids=len
)
def test_chunks_change_no_figure(more: tuple[Any, ...], base: str, rows: str, tmp_path: Path) -> None:
    more = ("--max_steps", 3, *more)
    assert train(base, rows, tmp_path / "chunks", *more) == 0
    assert train(base, rows, tmp_path / "whole", "--no-run.chunked_loss", *more) == 0
    assert len(losses(tmp_path / "whole")) == 6
    torch.testing.assert_close(losses(tmp_path / "chunks"), losses(tmp_path / "whole"), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("flag", ["--run.chunked_loss", "--no-run.chunked_loss"])
def test_smoothing_is_that_of_transformers(
    flag: str, base: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge is a run without reparam's loss, in which transformers smooths the labels."""
    assert train(base, rows, tmp_path / "ours", flag, "--label_smoothing_factor", 0.2, "--max_steps", 3) == 0

    original = Trainer.__init__

    def smoothed(self: Trainer, model: Any, args: Any, **more: Any) -> None:
        args.label_smoothing_factor = 0.2
        original(self, model, args, **more)

    monkeypatch.setattr(Trainer, "__init__", smoothed)
    assert train(base, rows, tmp_path / "theirs", "--no-run.chunked_loss", "--max_steps", 3) == 0
    torch.testing.assert_close(losses(tmp_path / "ours"), losses(tmp_path / "theirs"), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["prompt", "mixture"])
def test_methods_that_use_the_labels_train(
    method: str, base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Virtual tokens lengthen the labels, and the gates of whole sequences read the prompt's length from them."""
    settings = ("--method.router", "sequence") if method == "mixture" else ("--method.tokens", 2)
    more = ("--method", method, *settings, "--learning_rate", 0.3, "--max_steps", 3)
    assert train(base, rows, tmp_path / "chunks", *more) == 0
    assert "all logits" not in capsys.readouterr().out
    assert train(base, rows, tmp_path / "whole", "--no-run.chunked_loss", *more) == 0
    torch.testing.assert_close(losses(tmp_path / "chunks"), losses(tmp_path / "whole"), rtol=1e-3, atol=1e-3)
    assert train(base, rows, tmp_path / "smooth", "--optim.label_smoothing", 0.1, *more) == 0


def test_the_loss_belongs_to_the_run(base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(base, rows, tmp_path / "out") == 0
    assert train(base, rows, tmp_path / "out", "--optim.label_smoothing", 0.1) == 2
    assert "optim.label_smoothing was 0.0 and is now 0.1" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("value", [1, -0.1, "nan"])
def test_a_share_out_of_range_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^optim.label_smoothing: .*expected a number from 0 to below 1"):
        resolve(None, {"optim.label_smoothing": value})


def test_a_model_whose_loss_cannot_be_followed(
    base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mixtures whose gates read whole rows, on the output head."""
    more = ("--method", "mixture", "--method.router", "sequence", "--target_modules", "q_proj,lm_head", "--base.untie")
    more += ("--data.score_rows", 0)  # generation gives the head one token of each row, which such gates cannot tell
    assert train(base, rows, tmp_path / "out", *more) == 0
    assert "the loss is computed from all logits of a batch at once: the output head is adapted" in " ".join(
        capsys.readouterr().out.split()
    )
    assert train(base, rows, tmp_path / "other", "--optim.label_smoothing", 0.1, *more) == 2
    assert "optim.label_smoothing cannot be used with this model" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "other").exists()
