"""A run folder that is used again with other settings, data or weights is refused, and nothing in it changes."""

from __future__ import annotations

import shutil
from pathlib import Path

import command
import pytest
from safetensors.torch import load_file, save_file


def train(base: str, rows: str, output: Path, *more: object) -> int:
    return command.train(base, rows, output, "--max_steps", 2, *more)


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_difference_is_named_and_nothing_is_written(
    base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, data, out = tmp_path / "base", tmp_path / "rows.jsonl", tmp_path / "out"
    shutil.copytree(base, own)
    lines = Path(rows).read_text().splitlines()
    data.write_text("\n".join(lines) + "\n")
    assert train(str(own), str(data), out) == 0
    before = content(out)
    cases: dict[str, list[object]] = {
        "method.alpha": ["--lora_alpha", 64],
        "optim.learning_rate": ["--learning_rate", 0.01],
        "number of steps": ["--max_steps", 1],
        "optim.name": ["--optim", "sgd"],
        "data.max_length": ["--max_length", 64],
        "run.seed": ["--seed", 1],
    }
    for key, options in cases.items():
        assert train(str(own), str(data), out, *options) == 2, key
        assert key in " ".join(capsys.readouterr().err.split())
        assert content(out) == before
    data.write_text("\n".join(reversed(lines)) + "\n")
    assert train(str(own), str(data), out) == 2
    assert "content of data.train has changed" in " ".join(capsys.readouterr().err.split())
    data.write_text("\n".join(lines) + "\n")
    weights = load_file(own / "model.safetensors")
    weights["model.norm.weight"][3] += 1
    save_file(weights, own / "model.safetensors", metadata={"format": "pt"})
    assert train(str(own), str(data), out) == 2
    assert "content of base.path has changed" in " ".join(capsys.readouterr().err.split())
    assert content(out) == before
    shutil.copy(Path(base) / "model.safetensors", own / "model.safetensors")
    kept = out / "notes.txt"
    kept.write_text("mine")
    assert train(str(own), str(data), out, "--lora_alpha", 64, "--fresh") == 0
    assert "alpha = 64" in (out / "config.toml").read_text()
    assert kept.read_text() == "mine"
    assert train(str(own), str(data), out) == 2
    assert train(str(own), str(data), out, "--overwrite_output_dir") == 0
    free = ["--save_steps", 2, "--logging_steps", 1, "--save_total_limit", 5, "--eval_steps", 2]
    assert train(str(own), str(data), out, *free) == 0


def test_rows_of_a_folder_are_part_of_a_run(
    base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    lines = Path(rows).read_text().splitlines(keepends=True)
    for number in range(2):
        (data / f"{number}.jsonl").write_text("".join(lines[10 * number : 10 * number + 10]))
    assert train(base, str(data), out) == 0
    assert train(base, str(data), out) == 0
    (data / "1.jsonl").write_text("".join(lines[20:30]))
    assert train(base, str(data), out) == 2
    assert "content of data.train has changed" in " ".join(capsys.readouterr().err.split())
