"""Settings of all tests: one thread, no network, quiet libraries, short collections, a quick hypothesis profile."""

from __future__ import annotations

import gc
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
TASK = Path(__file__).parents[1] / "assets" / "tasks" / "signatures"

hypothesis.settings.register_profile("quick", max_examples=25, deadline=None, derandomize=True)
hypothesis.settings.load_profile("quick")

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs with SIGINT ignored


def pytest_collection(session: pytest.Session) -> None:
    """Compute in one thread: models are tiny, and several test processes share a machine.

    The process of pytest-xdist that only hands tests to its workers computes nothing, and imports no torch.
    """
    if not session.config.getoption("numprocesses", None):
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _short_collections() -> None:
    """Take what exists before a file's tests out of garbage collections.

    Trainer and torch.compile collect at every start: with the millions of objects of imported modules, for longer than
    they train or compile a tiny model.
    """
    gc.freeze()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome on this machine (Debian: apt-get install chromium)")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=[*FLAGS, *sandbox])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    from models import save_base

    folder = tmp_path_factory.mktemp("base") / "model"
    save_base(folder, tie_word_embeddings=True)
    return str(folder)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = (TASK / "train.jsonl").read_text().splitlines()[:80]
    file.write_text("\n".join(lines) + "\n")
    return str(file)


@pytest.fixture(scope="session")
def few(rows: str) -> str:
    """The first ten of these rows, for scores that any rows can show."""
    file = Path(rows).with_name("few.jsonl")
    file.write_text("".join(Path(rows).read_text().splitlines(keepends=True)[:10]))
    return str(file)
