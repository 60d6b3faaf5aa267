"""Errors advise what their reader can do: options on the command line, calls in Python."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command import reparam, train
from models import llama, save_base

import reparam as library


def test_an_adapter_of_another_base(base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    assert train(base, rows, out, "--max_steps", 1) == 0
    save_base(other, tie_word_embeddings=True, initializer_range=0.2)
    for call in (
        ["generate", "def f(x):", "-a", out, "-b", other],
        ["merge", tmp_path / "merged", "-a", out, "-b", other],
        ["eval", rows, "-a", out, "-b", other],
        ["train", "--base.path", other, "--data.train", rows, "--adapter.start", out, "-o", tmp_path / "more"],
    ):
        capsys.readouterr()
        assert reparam(*call) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "trained on a base with different weights" in said
        assert "give that base with --base" in said
        assert "check_base" not in said


def test_python_is_told_of_the_argument(tmp_path: Path) -> None:
    library.attach(llama(), "lora").save(tmp_path / "a")
    other = llama()
    torch.nn.init.normal_(other.lm_head.weight)
    with pytest.raises(library.FormatError, match="pass check_base=False"):
        library.load(other, tmp_path / "a")


def test_tied_weights(base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(base, rows, tmp_path / "out", "--target_modules", "lm_head") == 2
    assert "pass --base.untie to give each its own copy, pass --adapter.tie to let one" in " ".join(
        capsys.readouterr().err.split()
    )
    assert train(base, rows, tmp_path / "out", "--modules_to_save", "lm_head") == 2
    assert "--adapter.tie to train one weight for all of them, or leave lm_head out of modules_to_save" in " ".join(
        capsys.readouterr().err.split()
    )
    with pytest.raises(ValueError, match=r"give each its own copy, attach with tie=True"):
        library.attach(llama(tie_word_embeddings=True), "lora", targets=["lm_head"])
