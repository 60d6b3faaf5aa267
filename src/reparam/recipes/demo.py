"""`reparam demo`: train, compare and merge on embedded data, then check the merged model with plain transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.rule import Rule

from reparam.core.text import counted
from reparam.data.rows import read_rows
from reparam.evaluation.score import answer
from reparam.evaluation.terminal import say
from reparam.hf.models import load_tokenizer
from reparam.io.outputs import check_continued, clear
from reparam.methods.lora import LoRA
from reparam.recipes.merge import merge_to
from reparam.train.base import BaseConfig
from reparam.train.config import Config
from reparam.train.identity import RECORD
from reparam.train.run import train
from reparam.train.sections import AdapterConfig, DataConfig, OptimConfig, RunConfig
from reparam.train.show import Show

RESULTS = ("run", "merged")


def assets() -> Path:
    """Folder of the embedded model and tasks: in the package, or in the repository for a development install."""
    here = Path(__file__).resolve().parents[1]
    return here / "assets" if (here / "assets").is_dir() else here.parents[1] / "assets"


def demo(output: Path, *, seed: int, console: Console, overwrite: bool = False) -> None:
    """Run the demonstration and write its results into `output`.

    A second call goes on where the first one stopped; `overwrite` deletes its results first. Raises ValueError if
    `output` holds anything else, and RuntimeError if the merged model gives other answers than base and adapter.
    """
    check_continued(output, RESULTS, "a demonstration", ours=(output / "run" / RECORD).is_file(), fresh=overwrite)
    if overwrite:
        clear(output, RESULTS)
    base, task = assets() / "tiny-python", assets() / "tasks" / "signatures"
    say(console, Rule("1. train"))
    say(
        console,
        "Base: a small Llama trained on Python's standard library (a test model, not a language model).\n"
        "Task: list the argument names of a function, given its signature.",
    )
    config = Config(
        base=BaseConfig(path=str(base), dtype="float32"),
        data=DataConfig(train=str(task / "train.jsonl"), valid=str(task / "valid.jsonl"), max_length=256),
        adapter=AdapterConfig(),
        method=LoRA(r=8, alpha=16, seed=seed),
        optim=OptimConfig(learning_rate=5e-3),
        run=RunConfig(output=str(output / "run"), max_steps=300, batch_size=16, resume=True, seed=seed),
    )
    result = train(config, show=Show(console, fixed=True))
    if result.signal is not None:
        raise KeyboardInterrupt
    say(console, Rule("2. merge"))
    merged = output / "merged"
    merge_to(merged, str(base), str(result.folder), dtype="float32", overwrite=True, console=console)
    say(console, Rule("3. plain transformers"))
    _prove(merged, [adapted.given for _, adapted in result.answers], task / "valid.jsonl", console)
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
