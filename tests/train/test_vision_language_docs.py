"""The commands and the example in docs/vision-language.md run."""

import json
import re
import shlex
from pathlib import Path

import pytest
from command import reparam
from models import ASSETS
from PIL import Image
from vision_language import BASES

PAGE = (ASSETS.parent / "docs" / "vision-language.md").read_text()
SHORT = ("--max_steps", 1, "--batch_size", 2, "--data.score_rows", 1, "--lr", 0.05)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run trains; the others, which only differ in what they adapt, are shown and not run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    BASES["llava"](tmp_path / "model")
    (tmp_path / "llava").symlink_to(tmp_path / "model")
    for name in ("cat", "a", "b"):
        Image.new("RGB", (9, 8), "red").save(tmp_path / f"{name}.png")
    (block,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "rows.jsonl").write_text(block * 2)
    (tmp_path / "test.jsonl").write_text(block)
    assert len([json.loads(line) for line in block.splitlines()]) == 3
    commands = re.findall(r"^reparam .*?[^\\]$", PAGE, re.DOTALL | re.MULTILINE)
    assert len(commands) == 8
    for number, command in enumerate(commands):
        _, verb, *given = shlex.split(command.replace("\\\n", " "))
        more = (*SHORT, *(("--dry-run",) if number else ())) if verb == "train" else ()
        assert reparam(verb, *given, *more) == 0, command
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(example, "docs/vision-language.md", "exec"), names)
    assert len(names["adapter"].sites) == 16  # type: ignore[attr-defined]
