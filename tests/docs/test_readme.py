"""The README's claims, the code in the docs, and the scores of the embedded model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.main import get_command

import reparam
from reparam.cli import app
from reparam.cli.config_options import ALIASES, with_options
from reparam.core.registry import METHODS
from reparam.data.encode import encode
from reparam.data.rows import read_rows
from reparam.evaluation.score import score_loss

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def test_the_example_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})  # the example is this repository's own
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged").config.model_type == "llama"


ELSEWHERE = ("serving-http", "vision-language")  # pages that have a test of their own
DOCUMENTS = [path for path in PAGES if "```python" in path.read_text() and path.stem not in ELSEWHERE]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_the_code_in_the_documents_runs(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the blocks of each page in order, with a model, an optimizer, and finished adapters in `out`."""
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained("assets/tiny-python", dtype=torch.float32)
    for folder in ("a", "b", "first"):
        made = reparam.attach(model, reparam.LoRA(r=2))
        for update in made.updates.values():
            torch.nn.init.normal_(update.B)  # type: ignore[arg-type]
        made.save(f"out/{folder}")
        made.save(f"out/{folder}/adapter")
        reparam.remove(model, "default")
    names = {
        "reparam": reparam,
        "model": model,
        "optimizer": torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1),
        "input_ids": torch.randint(2, 90, (3, 5)),
    }
    methods = dict(METHODS)
    try:
        for code in re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL):
            exec(compile(code, document.name, "exec"), names)  # this repository's own
    finally:
        METHODS.clear()
        METHODS.update(methods)


def test_every_option_that_the_documents_print_exists() -> None:
    def command(overrides: object = None) -> None: ...

    known = {"--help"}
    known |= {f"--{name.replace('__', '.', 1)}" for name in with_options(command).__signature__.parameters}  # type: ignore[attr-defined]
    known |= {name for verb in get_command(app).commands.values() for option in verb.params for name in option.opts}  # type: ignore[attr-defined]
    known |= {alias for aliases in ALIASES.values() for alias in aliases}
    for document in [ROOT / "README.md", *PAGES]:
        for block in re.findall(r"```\n(reparam .*?)```", document.read_text(), re.DOTALL):
            words = shlex.split(block.replace("\\\n", " "), comments=True)
            assert {w for w in words if w.startswith("-")} <= known, document


def test_the_files_that_the_documents_name_are_there(site: ModuleType) -> None:
    """The linked files exist, or are generated when the site is built."""
    made = {ROOT / "docs" / path for path, _ in site.pages()}
    for document in [ROOT / "README.md", ROOT / "README.zh-CN.md", ROOT / "CONTRIBUTING.md", *PAGES]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)\s]*\)", document.read_text()):
            file = (document.parent / target).resolve()
            assert target.startswith("http") or file.exists() or file in made, f"{document.name}: {target}"


def test_the_embedded_model_scores_what_its_figures_say() -> None:
    folder = ROOT / "assets" / "tiny-python"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    figures = json.loads((folder / "figures.json").read_text())
    assert model.dtype == torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) == figures["parameters"]
    rows = read_rows(ROOT / "assets" / "tasks" / "reference" / "test.jsonl")[:8]
    score = score_loss(model.float(), encode(rows, tokenizer, max_length=512), tokenizer)
    assert 1.2 < score.value < 1.9, score  # prose it never saw; a damaged file gives 3 and more
