"""Write an adapter, or the model merged with it, in the form that another program serves, and print what was lost."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console

from reparam.adapter.adapter import Adapter
from reparam.adapter.context import context
from reparam.core.checks import finite, whole
from reparam.core.text import counted
from reparam.errors import ExportError
from reparam.evaluation.terminal import say
from reparam.export import gguf_adapter, gguf_model, mlx, vllm
from reparam.export.changes import LARGEST_ERROR, Change, changes_of, rank_for, worst_error
from reparam.hf.open import open_model
from reparam.io import mlx as mlx_files
from reparam.io.outputs import check_files
from reparam.io.peft import CONFIG, WEIGHTS
from reparam.recipes.merge import checked_base, merge_to
from reparam.recipes.merge import merged as merged_onto

TARGETS = {"vllm": vllm, "gguf": gguf_adapter, "mlx": mlx}
_FILES = {
    "vllm": (CONFIG, WEIGHTS),
    "gguf": (gguf_adapter.FILE, gguf_model.FILE),
    "mlx": (mlx_files.CONFIG, mlx_files.WEIGHTS),
}


def export_to(
    output: Path,
    adapter: str,
    to: str,
    *,
    base: str | None = None,
    dtype: str = "auto",
    task: str | None = None,
    rank: int | None = None,
    max_error: float = LARGEST_ERROR,
    merged: bool = False,
    overwrite: bool = False,
    console: Console,
) -> None:
    """Write the adapter for another program, and print its rank, its error and the command that uses it.

    Args:
        output: new folder.
        adapter: folder of the adapter or of its training run.
        to: "vllm", "gguf" (llama.cpp) or "mlx" (mlx-lm).
        base: folder or hub id of the base; None for the one in the adapter's file.
        dtype: dtype of the base, or "auto".
        task: the task, for a mixture adapter whose gates depend on it.
        rank: rank of the LoRA; None for the smallest that keeps within `max_error`.
        max_error: the largest share of its change that a module may lose, from 0 to 1.
        merged: merge the adapter into the base and write a whole model.
        overwrite: replace what an earlier call wrote to `output`.

    Raises ValueError for settings that exclude each other or are out of range, and if `output` is not empty;
    ExportError if the program cannot take the adapter; and the errors of `open_model`.
    """
    _check(to, rank, max_error, merged)
    if merged and to != "gguf":
        merge_to(output, base, adapter, dtype=dtype, task=task, overwrite=overwrite, console=console)
        return
    path = checked_base(output, base, adapter, task)
    check_files(output, _FILES[to], overwrite=overwrite)
    model, tokenizer, opened = open_model(base, adapter, dtype=dtype)
    if not isinstance(opened, Adapter):
        raise ExportError(f"{adapter}: virtual tokens are no change of weights, so {to} cannot take them")
    if merged:
        gguf_model.check_model(model.config)
        report = merged_onto(model, opened, path, task=task)
        gguf_model.write(output, model, tokenizer)
        say(console, str(report))
        say(console, f"merged model   {output / gguf_model.FILE}")
        return
    with context(model, tasks=task) if task is not None else nullcontext():
        rank = _written(output, opened, to, rank, max_error, console)
    say(console, f"written        {output}")
    say(console, f"next           {TARGETS[to].next_step(output, path, rank)}")


def _written(output: Path, adapter: Adapter, to: str, rank: int | None, max_error: float, console: Console) -> int:
    """Write the adapter, and print whether that is exact. Returns its rank."""
    program = TARGETS[to]
    gains = mlx.with_gains(adapter) if to == "mlx" and rank is None else None
    if gains is not None:
        rank = max(len(factors.A) for factors in gains.values())
        mlx.write(output, adapter, None, rank)
        say(console, f"exact: DoRA of rank {rank}, {counted(len(gains), 'module')}")
        return rank
    ranks = vllm.RANKS if to == "vllm" else None
    changes = changes_of(adapter, program.PROGRAM, most=max(ranks) if ranks else None, experts=to == "vllm")
    rank = rank_for(changes, ranks, rank, max_error, program.PROGRAM)
    program.write(output, adapter, changes, rank)
    say(console, _said(changes, rank))
    return rank


def _said(changes: dict[str, Change], rank: int) -> str:
    lower = [path for path, change in changes.items() if change.rank < rank]
    where, error = worst_error(changes, rank)
    told = f"LoRA of rank {rank}, {counted(len(changes), 'module')}"
    if lower:
        told += f", of which {len(lower):,} have a lower rank"
    if error == 0:
        return f"exact: {told}"
    return f"approximate: {told}; loses at most {100 * error:.2g} % of the change of a module ({where})"


def _check(to: str, rank: int | None, max_error: float, merged: bool) -> None:
    if to not in TARGETS:
        raise ValueError(f"--to {to}: expected one of {', '.join(TARGETS)}")
    if to == "gguf" and importlib.util.find_spec("gguf") is None:
        raise ValueError("--to gguf needs the package gguf: run  pip install 'reparam[gguf]'")
    if rank is not None and not whole(rank, 1):
        raise ValueError(f"--rank {rank}: expected a whole number of at least 1")
    if not (finite(max_error) and 0 <= max_error <= 1):
        raise ValueError(f"--max-error {max_error}: expected a number from 0 to 1")
    if merged and rank is not None:
        raise ValueError("--rank is for a LoRA, and --merged writes a whole model; leave one of them out")
