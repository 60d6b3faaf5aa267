"""Names and texts of unknown origin on the terminal: no markup, no emoji, no control characters, whatever prints."""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from command import reparam, train
from rich.console import Console
from rich.table import Table

import reparam as library
from reparam.data.rows import read_rows
from reparam.evaluation.score import Answer, Score
from reparam.evaluation.tables import answers_table, scores_table
from reparam.evaluation.terminal import say
from reparam.inspect.show import show
from reparam.io import files

ODD = "b[/y]:key:\x1b[31m$x^$\x9b2J"  # as one path: the folder `b[` with an entry
SHOWN = "b[/y]:key:␛[31m$x^$\\x9b2J"


@pytest.fixture(scope="module")
def run(base: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, rows and a trained adapter of odd names."""
    place = tmp_path_factory.mktemp("odd")
    for name in ("base", "rows", "run"):
        (place / f"{name}{ODD}").parent.mkdir()
    shutil.copytree(base, place / f"base{ODD}")
    shutil.copy(rows, place / f"rows{ODD}")
    assert train(str(place / f"base{ODD}"), str(place / f"rows{ODD}"), place / f"run{ODD}") == 0
    return place


COMMANDS = {
    "train": "train --base.path {base} --data.train {rows} -o {out} --max_steps 2 --data.score_rows 1",
    "generate": "generate a{odd} -a {run} --max-new-tokens 2 --compare",
    "eval": "eval {rows} -a {run}",
    "merge": "merge {out} -a {run}",
    "compose": "compose {run} {run}/checkpoint-6 --weights 1,2 -o {out} --rank 3",
    "search": "compose {run} {run}/checkpoint-6 --search {few} --valid {few} --budget 2 -o {out}",
    "compress": "compress {run} {out} --rank 4 --data {few}",
    "inspect": "inspect {run} -b {base} --plot {out} --deep --survival --against {run} --suggest 0.9",
    "inspect a model": "inspect {base}",
    "quantize": "quantize {base} {out} --block 32",
    "compare": "compare --base {base} --data.train {rows} --methods lora --rates 1e-2 --seeds 1 --rows 2 --max_steps 2"
    " -o {out}",
    "intrinsic": "intrinsic --base {base} --data {rows} --grid 10:11 --rates 0.01 --full-rates 0.01 --max_steps 2"
    " --metric saved --share 0.01 -o {out}",
}


@pytest.mark.filterwarnings("default:targets. skipped", "default:search. budget")
@pytest.mark.parametrize("what", COMMANDS)
def test_a_command_with_odd_names(what: str, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    few = tmp_path / ODD
    few.parent.mkdir()
    few.write_text("\n".join((run / f"rows{ODD}").read_text().splitlines()[:2]))
    out = tmp_path / f"out{ODD}"
    names = {"base": run / f"base{ODD}", "rows": run / f"rows{ODD}", "run": run / f"run{ODD}", "few": few, "out": out}
    verb, *rest = COMMANDS[what].split()
    code = reparam(verb, *(word.format(odd=ODD, **names) for word in rest))
    told = capfd.readouterr()
    assert code == 0, told.err
    assert "\x1b" not in told.out + told.err.replace("\x1b[A", "")  # transformers' own progress bars move the cursor
    assert "\x9b" not in told.out + told.err
    if "{out}" in COMMANDS[what]:
        assert out.exists()
        assert SHOWN in told.out


@pytest.mark.parametrize(
    "command",
    [
        "train --base.path {} --data.train rows.jsonl",
        "generate a -a {}",
        "eval {} -b {}",
        "merge out -a {}",
        "compose {} -o out",
        "compress {} out --rank 1",
        "inspect {}",
        "quantize {} out",
        "compare {}",
        "intrinsic -c {}",
        "demo {}",
        "{}",
        "merge --{} out",
    ],
)
def test_a_failure_that_names_it(command: str, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    os.chdir(tmp_path)
    assert reparam(*(word.format(ODD) for word in command.split())) == 2
    told = capfd.readouterr()
    assert "b[/y]:key:" in told.err
    assert "\x1b" not in told.err
    assert "\x9b" not in told.err


def test_a_fault_of_the_package_has_a_traceback_without_control_characters(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **settings: object) -> None:
        raise AttributeError(ODD)

    monkeypatch.setattr("reparam.inspect.show.show", broken)
    assert reparam("inspect", "x") == 1
    told = capfd.readouterr().err
    assert "Traceback" in told
    assert f"AttributeError: {SHOWN}" in told
    assert "\x1b" not in told


def test_names_inside_an_adapter_with_a_console_of_the_user(run: Path, tmp_path: Path) -> None:
    """Site names with markup and control characters, on a console that has markup and emoji on."""
    record = files.read(files.adapter_folder(run / f"run{ODD}"))

    def odd(name: str) -> str:
        return name.replace("mlp", "m[/bold]:key:\x1b[31m$x^$")

    sites = {odd(n): dataclasses.replace(site, name=odd(n)) for n, site in record.sites.items()}
    tensors = {odd(key): value for key, value in record.tensors.items()}
    files.write(tmp_path / "odd", dataclasses.replace(record, sites=sites, tensors=tensors, base=None))
    told = io.StringIO()
    show(tmp_path / "odd", None, Console(file=told, width=150), plot=tmp_path / "plots")
    assert "m[/bold]:key:␛[31m$x^$" in told.getvalue()
    assert "\x1b" not in told.getvalue()
    rows = [line for line in told.getvalue().splitlines() if "layers.0" in line]
    assert len({len(line) for line in rows}) == 1  # the columns are aligned
    colored = io.StringIO()
    show(tmp_path / "odd", None, Console(file=colored, width=150, force_terminal=True, color_system="standard"))
    assert "\x1b[31m$x^$" not in colored.getvalue()
    assert "\x1b[1m" in colored.getvalue()


def test_rows_and_answers(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "a [red]:key:\x1b[2J", "completion": "[/]\u202e\x07"}))
    [row] = read_rows(file)
    given = Answer(row.source, row.prompt, row.completion, "[bold]\x1b]0;title\x07")
    told = io.StringIO()
    say(Console(file=told, width=150, markup=True, emoji=True), answers_table([(given, given)]))
    for text in ("a [red]:key:␛[2J", "[/]\\u202e␇", "[bold]␛]0;title␇"):
        assert text in told.getvalue()
    scores = [Score("loss [x]", 1.0, 0.5, 1.5, 1, larger_is_better=False)]
    table = scores_table(scores, scores)
    table.title = "[/title]"
    say(Console(file=told, width=150), table)
    assert "loss [x]" in told.getvalue()
    assert "[/title]" in told.getvalue()


def test_a_name_that_a_terminal_in_ascii_cannot_show(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(told, encoding="ascii", write_through=True))
    adapter = files.adapter_folder(run / f"run{ODD}")
    assert reparam("compress", adapter, tmp_path / "out\u0394", "--rank", 2) == 0
    assert rb"out\u0394" in told.getvalue()
    assert rb"change \u0394W" in told.getvalue()


def test_a_table_keeps_the_width_of_what_is_shown() -> None:
    table = Table("x", "y")
    table.add_row("\x1b\x1b\x1b", "1")
    told = io.StringIO()
    say(Console(file=told, width=40), table)
    assert len({len(line) for line in told.getvalue().splitlines()}) == 1


def test_nothing_prints_in_another_way() -> None:
    """Only `say`, and the help of the command line, whose text is ours, print."""
    root = Path(library.__file__).parent
    allowed = {"evaluation/terminal.py", "cli/help.py", "cli/config_options.py", "cli/options.py", "cli/__init__.py"}
    allowed |= {"data/sandbox.py"}  # speaks with its parent process
    found = {
        file.relative_to(root).as_posix()
        for file in root.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and (ast.unparse(node.func) in ("print", "rich.print") or ast.unparse(node.func).endswith((".print", ".rule")))
    }
    assert found <= allowed
