"""Waits: bars on a terminal, one line for each long wait elsewhere, nothing beside JSON, and nothing in the library."""

from __future__ import annotations

import io
import json
import threading
import time
from pathlib import Path

import pytest
from command import reparam, train
from forks import Forked, on_terminal
from rich.console import Console

from reparam.cli import screen
from reparam.core.progress import heard, listening, tracked, waiting
from reparam.evaluation import waits as waits_
from reparam.evaluation.waits import Waits


def slow(count: int, seconds: float) -> None:
    for _ in tracked(range(count), "counting [x]\x1b", unit="rows"):
        time.sleep(seconds)


def test_elsewhere_a_long_wait_has_one_line_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits_, "TOLD", 0.2)
    told = io.StringIO()
    with listening(Waits(Console(file=told, width=40))):
        slow(10, 0.05)
        slow(2, 0.01)
        with waiting("loading"):
            time.sleep(0.4)
    first, second = told.getvalue().splitlines()
    assert first.startswith("counting [x]␛ ...  ")
    assert first.endswith(" of 10 rows, about 1 s left")
    assert second == "loading ..."


def test_the_line_waits_until_the_time_left_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits_, "TOLD", 0.05)
    told = io.StringIO()
    with listening(Waits(Console(file=told, width=80))), waiting("encoding", 5, unit="rows") as advance:
        time.sleep(0.2)
        assert told.getvalue() == ""
        advance(2)
        advance(2)
    assert told.getvalue() == "encoding ...  2 of 5 rows, about 1 s left\n"


def test_on_a_terminal_a_long_wait_has_a_bar_that_disappears(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits_, "SHOWN", 0.1)
    told = io.StringIO()
    with listening(Waits(Console(file=told, width=100, force_terminal=True, color_system=None))):
        slow(2, 0.01)
        assert told.getvalue() == ""
        slow(10, 0.1)
    text = told.getvalue()
    assert "counting [x]␛" in text
    assert "10 rows" in text
    assert "\x1b[2K" in text[text.rindex("rows") :]  # the bar's line is erased


def test_an_opening_ends_when_a_wait_begins_and_an_error_ends_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits_, "TOLD", 0.1)
    told = io.StringIO()
    shown = Waits(Console(file=told, width=80))
    with listening(shown):
        shown.opening("starting")
        with pytest.raises(KeyError), waiting("failing"):
            raise KeyError
        time.sleep(0.3)
    shown.close()
    assert told.getvalue() == ""


def test_nobody_listens_to_the_library_and_to_verbs_that_print_json() -> None:
    assert not heard()
    with screen.waits("eval", {"json": True}):
        assert not heard()
    with screen.waits("eval", {"json": False}):
        assert heard()
    assert not heard()


class Now(threading.Timer):
    """A timer whose time has come when it starts."""

    def start(self) -> None:
        self.function(*self.args)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show every wait, however short it is."""
    monkeypatch.setattr(waits_.threading, "Timer", Now)


def test_on_standard_error_when_piped(base: str, rows: str, few: str, tmp_path: Path, at_once: None) -> None:
    assert train(base, rows, tmp_path / "run", "--max_steps", 1) == 0
    ran = Forked(lambda: reparam("eval", few, "-a", tmp_path / "run"))
    code, out = ran.end()
    assert code == 0, ran.errors
    for what in ("starting eval", f"loading {base}", "encoding rows", "scoring held-out rows", "generating answers"):
        assert ran.errors.count(f"{what} ...") in (1, 2)  # once for the base, once for the adapter
        assert what not in out
    quiet = Forked(lambda: reparam("eval", few, "-a", tmp_path / "run", "--json"))
    _, out = quiet.end()
    assert quiet.errors == ""
    assert json.loads(out)["base"]


def test_on_a_terminal(base: str, tmp_path: Path, at_once: None) -> None:
    def quantize() -> int:
        screen.console.is_interactive = True  # which it found when it was made, for another output
        return reparam("quantize", base, tmp_path / "out", "--block", 32)

    told = on_terminal(quantize)
    for what in ("starting quantize", f"loading {base}", f"writing {tmp_path / 'out'}"):
        assert what in told
    assert f"quantized model   {tmp_path / 'out'}" in told
