"""Tables of many sites have one row for the same module in all layers."""

from pathlib import Path

import pytest
from adapters import trained
from command import reparam as command
from models import llama

from reparam import LoRA
from reparam.inspect import tables


def test_many_sites_are_shown_by_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(llama(), method=LoRA(r=2), targets="all-linear").save(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    assert command("inspect", tmp_path, "--deep") == 0
    single = capsys.readouterr().out
    assert "0.self_attn.q_proj" in single
    monkeypatch.setattr(tables, "MOST", 13)
    assert command("inspect", tmp_path, "--deep") == 0
    folded = capsys.readouterr().out
    assert "*.self_attn.q_proj (2)" in folded
    assert "14 sites: a row with * has the range over all layers" in folded
    values = [[cell.strip() for cell in line.split("│")] for line in single.splitlines() if "self_attn.q_proj" in line]
    (row,) = (
        [cell.strip() for cell in line.split("│")] for line in folded.splitlines() if "*.self_attn.q_proj" in line
    )
    at = len(row) - 3  # σ1
    low, high = sorted((cells[at] for cells in values if len(cells) == len(row)), key=float)
    assert row[at] == (low if low == high else f"{low} to {high}")
