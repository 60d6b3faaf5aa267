"""Verbs of the command line on damaged runs, adapters, bases and data: one error, nothing half-written.

REPARAM_TESTS=full tries many more copies; `python tests/helpers/damaged_calls.py 0 100` tries others.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from damaged_calls import CALLS, attempt, make

COPIES = 60 if os.environ.get("REPARAM_TESTS") == "full" else 1


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calls") / "original"
    make(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", CALLS)
def test_a_damaged_workspace(name: str, workspace: Path, tmp_path: Path) -> None:
    for seed in range(COPIES):
        done, found = attempt(name, workspace, tmp_path / "copy", seed)
        assert not found.startswith("WRONG"), f"{name}, seed {seed}: {done}: {found}"
