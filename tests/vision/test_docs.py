"""The example in docs/vora.md runs."""

import re
from pathlib import Path

import pytest
from models import ASSETS

PAGE = ASSETS.parent / "docs" / "vora.md"


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "assets").symlink_to(ASSETS)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(PAGE), "exec"), {})
    assert (tmp_path / "out" / "vora" / "language" / "model.safetensors").exists()
    assert capsys.readouterr().out
