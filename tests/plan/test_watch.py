"""The plan beside a run: it equals what the longest batch holds, and the run is the same without it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import train
from models import save_base
from safetensors.torch import load_file
from sampled import FULL


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base in which activations and logits are most of the memory."""
    folder = tmp_path_factory.mktemp("watch") / "model"
    save_base(folder, hidden_size=128, intermediate_size=352, num_hidden_layers=1)
    return str(folder)


def events(out: str) -> dict[str, dict[str, Any]]:
    return {found["event"]: found for found in map(json.loads, out.splitlines())}


CASES = [
    ["--method", "lora", "--method.dropout", 0.3],
    ["--method", "adalora", "--method.tinit", 1, "--method.tfinal", 1],
    ["--method", "dora", "--storage", "nf4", "--gradient_checkpointing"],
    ["--method", "full", "--no-run.chunked_loss"],
    ["--method", "molora"],
]
if not FULL:
    CASES = CASES[::2]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[1])
def test_the_plan_is_what_is_held_and_the_run_does_not_change(
    wide: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: list[object]
) -> None:
    files = []
    for name in ("with", "without"):
        more = ["--json", *(["--plan"] if name == "with" else []), "--base.dtype", "float32"]
        assert train(wide, rows, tmp_path / name, *more, "--max_steps", 3, *case) == 0
        said = events(capsys.readouterr().out)
        files.append(load_file(tmp_path / name / "adapter" / "adapter.safetensors"))
        assert ("memory_plan" in said) == ("memory_held" in said) == (name == "with")
        if name == "with":
            planned, held = said["memory_plan"]["peak"], said["memory_held"]["held"]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert planned == pytest.approx(held, rel=0.02)


def test_what_cannot_be_planned_is_said(
    base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(base, rows, tmp_path, "--plan", "--method", "prefix", "--json") == 0
    notes = [found["text"] for found in map(json.loads, capsys.readouterr().out.splitlines()) if "text" in found]
    assert any("cannot be planned: " in text and "prefix changes no weights" in text for text in notes)
