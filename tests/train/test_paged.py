"""reparam's optimizers in a run: equal to torch's, exact resume, printed counters, clear errors."""

from __future__ import annotations

import io
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from models import save_base
from rich.console import Console
from stopping import Stopping

from reparam.errors import ConfigError
from reparam.train.config import resolve
from reparam.train.job import Result
from reparam.train.optimizer import check_optimizer
from reparam.train.ranges import bytes_of
from reparam.train.run import train
from reparam.train.sections import OptimConfig
from reparam.train.show import Show

ASSETS = Path(__file__).parents[2] / "assets"
OURS = pytest.mark.parametrize("name", ["paged_adamw_32bit", "paged_adamw_8bit"])
PAGES = {"optim.page": "4KiB", "optim.budget": "12KiB"}


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a short run: a tiny base with biases, and rows."""
    folder = tmp_path_factory.mktemp("paged")
    save_base(folder / "base", attention_bias=True)
    lines = (ASSETS / "tasks" / "signatures" / "train.jsonl").read_text().splitlines()[:60]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return {
        "base.path": str(folder / "base"),
        "data.train": str(folder / "rows.jsonl"),
        "data.score_rows": 1,
        "adapter.bias": True,
        "optim.learning_rate": 0.02,
        "optim.weight_decay": 0.1,
        "run.max_steps": 6,
        "run.batch_size": 2,
    }


def go(common: dict[str, Any], output: Path, *, stop: int = 0, **optim: Any) -> tuple[Result, str]:
    """Run the training; returns the result and the printed text."""
    text = io.StringIO()
    console = Console(file=text, width=200)
    overrides = {**common, "run.output": str(output), **{key.replace("__", "."): value for key, value in optim.items()}}
    show = Stopping(console, stop) if stop else Show(console)
    return train(resolve(None, overrides), show=show), text.getvalue()


def adapter(output: Path) -> bytes:
    return (output / "adapter" / "adapter.safetensors").read_bytes()


def test_32_bits_train_what_torch_does_bit_for_bit(common: dict[str, Any], tmp_path: Path) -> None:
    """With weight decay and biases, in the groups of transformers."""
    go(common, tmp_path / "torch")
    result, printed = go(common | PAGES, tmp_path / "ours", optim__name="paged_adamw_32bit")
    assert adapter(tmp_path / "torch") == adapter(tmp_path / "ours")
    paging = json.loads((tmp_path / "ours" / "figures.json").read_text())["paging"]
    assert paging["peak_resident"] == 12 * 1024 < paging["total"]
    assert paging["bytes_in"] == 4096 * (paging["faults"] + paging["prefetched"]) > 0
    assert result.paging is not None
    assert f"at most 0.01 MiB of {paging['total'] / 2**20:.2f} MiB of states on the device" in printed
    assert f"{paging['prefetched']:,} pages prefetched" in printed
    assert json.loads((tmp_path / "torch" / "figures.json").read_text())["paging"] is None


@OURS
def test_an_interrupted_run_ends_as_one_that_was_not(name: str, common: dict[str, Any], tmp_path: Path) -> None:
    go(common | PAGES, tmp_path / "whole", optim__name=name)
    stopped, _ = go(common | PAGES, tmp_path / "broken", optim__name=name, stop=4)
    assert stopped.signal == signal.SIGTERM
    assert (tmp_path / "broken" / "checkpoint-4" / "optimizer.safetensors").is_file()
    go(common, tmp_path / "broken", optim__name=name, optim__budget="8KiB", optim__page="8KiB")  # others than before
    assert adapter(tmp_path / "broken") == adapter(tmp_path / "whole")


def test_without_pages_8_bits_are_the_same(common: dict[str, Any], tmp_path: Path) -> None:
    for name in ("adamw_8bit", "paged_adamw_8bit"):
        result, _ = go(common | PAGES, tmp_path / name, optim__name=name)
        assert result.paging is not None
        assert (result.paging.evictions == 0) == (name == "adamw_8bit")
    assert adapter(tmp_path / "adamw_8bit") == adapter(tmp_path / "paged_adamw_8bit")


def test_bits_cannot_change_in_a_run(common: dict[str, Any], tmp_path: Path) -> None:
    go(common | PAGES, tmp_path / "run", optim__name="paged_adamw_32bit", stop=2)
    with pytest.raises(ValueError, match=r"optim.name was 'paged_adamw_32bit' and is now 'paged_adamw_8bit'"):
        go(common | PAGES, tmp_path / "run", optim__name="paged_adamw_8bit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": "64MB"}, "optim.budget: '64MB' is not a number of bytes; write 67108864, 65536KiB, 64MiB or 1GiB"),
        ({"page": "-1"}, "optim.page: '-1' is not a number of bytes"),
        (
            {"budget": "1KiB"},
            r"optim: budget=1024 bytes is less than one page \(1048320 bytes\): raise budget or lower page",
        ),
        ({"learning_rate": -1.0}, "optim.learning_rate: -1.0: expected a finite number above 0"),
        ({"name": "paged_adamw_4bit"}, "optim.name: 'paged_adamw_4bit' is unknown to transformers"),
    ],
    ids=str,
)
def test_mistakes_are_named_before_anything_is_read(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        check_optimizer(OptimConfig(**{"name": "paged_adamw_8bit", **settings}))


def test_numbers_of_bytes() -> None:
    texts = {"0": 0, " 12 ": 12, "3KiB": 3072, "3 KiB": 3072, "2GiB": 2**31, 77: 77}
    assert {text: bytes_of("budget", text) for text in texts} == texts
