"""The command line, run in this process, with a small base and a few rows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from reparam.cli import main

ASSETS = Path(__file__).parents[2] / "assets"


TASK = ASSETS / "tasks" / "signatures"


def reparam(*arguments: object) -> int:
    """Run the command line in this process; the exit code. Training plans its memory with --plan alone."""
    before = sys.argv
    sys.argv = ["reparam", *map(str, arguments)]
    if sys.argv[1:2] == ["train"] and "--plan" not in sys.argv:
        sys.argv.insert(2, "--no-plan")
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = before
    assert isinstance(ended.value.code, int)
    return ended.value.code


def train(base: str, rows: str, output: object, *more: object) -> int:
    steps = ["--max_steps", 6, "--batch_size", 4, "--learning_rate", 0.05, "--data.score_rows", 3]
    return reparam("train", "--base.path", base, "--data.train", rows, "-o", output, *steps, *more)
