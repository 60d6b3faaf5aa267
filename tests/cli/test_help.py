"""What `--help`, `--version` and shell completion print, and which modules they import."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys

import pytest
from command import reparam
from sampled import FULL

import reparam as package
from reparam.cli.config_options import ALIASES, USUAL
from reparam.cli.options import VERBS
from reparam.core.documentation import documentation
from reparam.core.registry import METHODS
from reparam.train.config import SECTIONS, fields_of
from reparam.train.sections import OptimConfig

# Runs `python -m reparam` with the modules in `missing` made impossible to import, and reports what it imported.
MAIN = """
import runpy, sys
for missing in {missing!r}:
    sys.modules[missing] = None
sys.argv = ["reparam", *{arguments!r}]
try:
    runpy.run_module("reparam", run_name="__main__", alter_sys=True)
finally:
    print("imported:", *{{"torch", "transformers"}} & set(sys.modules), file=sys.stderr)
"""


def command(*arguments: str, missing: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    code = MAIN.format(missing=missing, arguments=arguments)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "COLUMNS": "80", **environment}
    )


def test_the_module_runs_as_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "reparam", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"reparam {package.__version__}\n")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["merge", "--help"], ["generate", "--help"]])
def test_help_and_version_import_neither_torch_nor_transformers(arguments: list[str]) -> None:
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr.split() == ["imported:"]
    assert "reparam" in done.stdout


def test_completion_imports_neither_and_names_every_verb() -> None:
    done = command(_REPARAM_COMPLETE="complete_bash", COMP_WORDS="reparam ", COMP_CWORD="1")
    assert done.stdout.split() == list(VERBS)
    assert done.stderr.split() == ["imported:"]


@pytest.mark.parametrize("verb", ["train", "compare", "intrinsic", "quantize"] if FULL else ["compare"])
def test_help_of_a_verb_imports_no_transformers(verb: str) -> None:
    done = command(verb, "--help")
    assert done.returncode == 0, done.stderr
    assert "transformers" not in done.stderr


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [
        ("typer", ["--help"]),
        ("transformers", ["train", "--base", "model", "--data", "rows.jsonl"]),
        ("pydantic", ["train", "--help"]),
    ],
)
def test_a_missing_extra_gets_one_sentence(missing: str, arguments: list[str]) -> None:
    done = command(*arguments, missing=(missing,))
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == f"The command line needs {missing}: run  pip install 'reparam[cli]'"
    assert "Traceback" not in done.stderr


def test_the_first_line_of_train_comes_before_transformers() -> None:
    """It is printed although the import of transformers then fails."""
    done = command("train", "--base", "model", "--data", "rows.jsonl", missing=("transformers",))
    assert done.returncode == 2
    assert done.stdout == "training lora on model with rows.jsonl; results go to out\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert reparam("--version") == 0
    assert capsys.readouterr().out == f"reparam {package.__version__}\n"


def keys() -> set[str]:
    found = {f"{section}.{name}" for section in SECTIONS for name in fields_of(section)}
    found |= {f"method.{field.name}" for method in METHODS.values() for field in dataclasses.fields(method)}
    return found | {"method.name"}


def named(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-z][\w.-]*", text))


@pytest.mark.parametrize("verb", ["train", "compare", "intrinsic"])
def test_help_all_names_every_key_whole(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert reparam(verb, "--help-all") == 0
    out = capsys.readouterr().out
    assert {f"--{key}" for key in keys()} <= named(out)
    if verb == "train":
        assert {alias for aliases in ALIASES.values() for alias in aliases} <= named(out)
    assert "…" not in out


def test_help_of_train_is_short_and_names_the_usual_keys_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert reparam("train", "--help") == 0
    out = capsys.readouterr().out
    assert {f"--{key}" for key in USUAL} | {alias for key in USUAL for alias in ALIASES[key]} <= named(out)
    assert "--optim.weight_decay" not in out
    assert len(out.splitlines()) < 100
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("verb", VERBS)
def test_no_name_is_cut_at_80_columns(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from reparam.cli import app

    monkeypatch.setenv("COLUMNS", "80")
    assert reparam(verb, "--help") == 0
    out = capsys.readouterr().out
    import typer.main

    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    shown = [option for option in command.params if not getattr(option, "hidden", False)]
    assert {name for option in shown for name in option.opts if name.startswith("-")} <= named(out)
    assert "…" not in out


@pytest.mark.parametrize("option", ["--help-method", "--help.method"])
def test_help_method_shows_one_method(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert reparam("train", option, "dora") == 0
    out = capsys.readouterr().out
    assert {name for name in named(out) if name.startswith("--method.")} == {
        f"--method.{field.name}" for field in dataclasses.fields(METHODS["dora"])
    }


def test_help_method_names_the_nearest_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert reparam("train", "--help-method", "lorra") == 2
    assert "'lora'" in capsys.readouterr().err


def test_documentation_is_read_once_and_inherited() -> None:
    assert documentation(OptimConfig)["learning_rate"] == "Peak learning rate."
    assert documentation(OptimConfig) is documentation(OptimConfig)
    assert documentation(METHODS["dora"])["r"] == documentation(METHODS["lora"])["r"] != ""
    for cls in [*SECTIONS.values(), *METHODS.values()]:
        assert {field.name for field in dataclasses.fields(cls)} - {"seed"} <= set(documentation(cls)), cls
