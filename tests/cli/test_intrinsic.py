"""`reparam intrinsic` on a tiny base: figures, plot, resuming, and refusals; its adapters are ordinary ones."""

import json
import re
from pathlib import Path

import pytest
from command import reparam

SHORT = (
    "--base.untie",
    "--max_steps",
    5,
    "--batch_size",
    4,
    "--metric",
    "saved",
    "--full-rates",
    "1e-3",
    "--rates",
    "3e-2",
)


def study(base: str, rows: str, output: Path, *more: object) -> int:
    return reparam("intrinsic", "--base", base, "--data", rows, "-o", output, *SHORT, *more)


@pytest.fixture(scope="module")
def found(base: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a share so small that some size passes."""
    output = tmp_path_factory.mktemp("study") / "out"
    assert study(base, rows, output, "--grid", "4:400", "--each", 1, "--share", 0.05, "--maps", 2) == 0
    return output


def test_the_curve_is_written(found: Path) -> None:
    figures = json.loads((found / "intrinsic.json").read_text())
    sizes = [point["d"] for point in figures["points"]]
    assert {4, 40, 400} <= set(sizes)
    assert sizes == sorted(sizes)
    assert all(len(point["values"]) == 2 for point in figures["points"])
    assert figures["metric"] == "saved"
    assert figures["threshold"] == pytest.approx(0.05 * figures["full"])
    passing = [point["d"] for point in figures["points"] if point["passes"]]
    assert figures["d90"] == min(passing, default=None)
    assert (figures["d90"] is None) == (figures["suggested LoRA rank"] is None)
    assert (found / "intrinsic.png").read_bytes().startswith(b"\x89PNG")


def test_no_run_is_repeated(
    found: Path,
    base: str,
    rows: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also if the grid grows; a run with other settings is a new run."""
    before = {file: file.stat().st_mtime_ns for file in found.glob("runs/*/result.json")}
    first = json.loads((found / "intrinsic.json").read_text())
    assert study(base, rows, found, "--grid", "4:400", "--each", 1, "--share", 0.05, "--maps", 2) == 0
    assert json.loads((found / "intrinsic.json").read_text()) == first
    assert {file: file.stat().st_mtime_ns for file in found.glob("runs/*/result.json")} == before
    assert "map 1" in capsys.readouterr().out


def test_a_run_is_an_ordinary_adapter(found: Path, base: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = next(found.glob("runs/did-400-*-0-*"))
    assert reparam("inspect", folder / "adapter", "--base", base) == 0
    assert "intrinsic" in capsys.readouterr().out
    assert not any((full / "adapter").exists() for full in found.glob("runs/full-*"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--grid", "10"), "expected two whole numbers"),
        (("--method.d", 5), "--method.d: use --grid instead"),
        (("--lr", 0.1), "--optim.learning_rate: use --rates instead"),
        (("--method", "lora"), "use --method intrinsic to find d90"),
        (("--grid", "3:9", "--method.mode", "said"), "leaves none"),
        (("--grid", "10:99999999"), "only .* parameters can move"),
        (("--metric", "exact", "--data.score_rows", 0), "counts right answers"),
        (("--rates", "fast"), "comma-separated numbers"),
    ],
)
def test_refusals(
    more: tuple[object, ...],
    words: str,
    base: str,
    rows: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each gives one sentence, before anything is trained."""
    assert study(base, rows, tmp_path / "out", *more) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert re.search(words, shown), shown
    assert not (tmp_path / "out/runs").exists()


def test_a_reference_that_learned_no_answer_is_refused(
    base: str,
    rows: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ("--metric", "exact", "--data.score_rows", 2, "--max_steps", 2)
    assert study(base, rows, tmp_path / "out", *more) == 2
    assert "but must be above 0" in " ".join(capsys.readouterr().err.split())
