"""The commands and clients of docs/serving-http.md run, each against the server that the page starts before them."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from served_command import serve
from transformers import AutoModelForCausalLM

import reparam

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving-http.md").read_text()
BLOCK = re.compile(r"```(sh|python|)\n(.*?)```", re.DOTALL)


def servers() -> list[tuple[list[str], list[tuple[str, str]]]]:
    """The arguments of each `reparam serve`, with the blocks of code up to the next one."""
    found: list[tuple[list[str], list[tuple[str, str]]]] = []
    for kind, code in BLOCK.findall(PAGE):
        if "--ray" in code:  # tests/serve/test_ray.py starts it
            continue
        if code.startswith("reparam serve "):
            found.append((shlex.split(code)[2:], []))
        elif kind:
            found[-1][1].append((kind, code))
    return found


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_page_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").symlink_to(ROOT / "assets" / "tiny-python")
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained("model")
    for folder in ("a", "b", "first"):
        made = reparam.attach(model, reparam.LoRA(r=2))
        for update in made.updates.values():
            torch.nn.init.normal_(update.B, 0, 0.02)  # type: ignore[arg-type]
        made.save(f"out/{folder}")
        reparam.remove(model, "default")
    del model
    assert [len(blocks) for _, blocks in servers()] == [2, 1]
    for arguments, blocks in servers():

        def ask(port: int, blocks: list[tuple[str, str]] = blocks) -> None:
            for kind, code in blocks:
                code = code.replace(":8000", f":{port}")
                if kind == "python":
                    exec(compile(code, "serving-http.md", "exec"), {})  # this repository's own
                else:
                    code = code.replace("curl ", "curl --fail-with-body --silent --show-error ")
                    done = subprocess.run(["bash", "-ec", code], capture_output=True, text=True, timeout=120)
                    assert done.returncode == 0, (code, done.stdout, done.stderr)

        assert serve(*arguments, ask=ask) == 0
    assert "http://127.0.0.1:" in capfd.readouterr().out


def test_the_page_tells_the_limits_as_they_are() -> None:
    from typer.main import get_command

    from reparam.cli import app

    (table,) = re.findall(r"\| option \| default \| what \|\n(.*?)\n\n", PAGE, re.DOTALL)
    told: dict[str, str] = {}
    for row in table.splitlines()[1:]:
        names, values = row.split("|")[1:3]
        numbers = re.findall(r"[\d,]*\d(?: [GM]iB)?", values.replace(", ", " ; "))
        told |= dict(zip(re.findall(r"--[a-z-]+", names), numbers, strict=True))
    units = {"GiB": 1 << 30, "MiB": 1 << 20}
    known = {o.opts[0]: o.default for o in get_command(app).commands["serve"].params}  # type: ignore[attr-defined]
    for name, value in told.items():
        number, _, unit = value.replace(",", "").partition(" ")
        assert known[name] == int(number) * units.get(unit, 1), name
    assert len(told) == 10
