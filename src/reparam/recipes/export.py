"""Write an adapter, or the model merged with it, in the form that another program serves, and print what was lost."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console

from reparam.adapter.adapter import Adapter
from reparam.adapter.context import context
from reparam.adapter.merge import merge
from reparam.adapter.quantize import quantize
from reparam.core.checks import finite, whole
from reparam.core.text import counted
from reparam.errors import ExportError
from reparam.evaluation.terminal import say
from reparam.export import gguf_adapter, gguf_model, mlx, vllm
from reparam.export.changes import LARGEST_ERROR, Change, changes_of, rank_for, worst_error
from reparam.hf.models import check_not_base, save_model
from reparam.hf.open import base_of, open_model
from reparam.io import files
from reparam.io import mlx as mlx_files
from reparam.io.files import adapter_folder
from reparam.io.outputs import check_apart, check_files, check_model_folder
from reparam.io.peft import CONFIG, WEIGHTS
from reparam.recipes.task import check_task
from reparam.sites.walk import storages_in

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
    check_task(task, adapter)
    folder = adapter_folder(adapter)
    path = base or base_of(files.read(folder), folder)
    check_not_base(output, path)
    check_apart(output, [folder], "the adapter")
    if merged and to != "gguf":
        check_model_folder(output, overwrite=overwrite)
    else:
        check_files(output, _FILES[to], overwrite=overwrite)
    model, tokenizer, opened = open_model(base, adapter, dtype=dtype)
    if not isinstance(opened, Adapter):
        raise ExportError(f"{folder}: virtual tokens are no change of weights, so {to} cannot take them")
    with context(model, tasks=task) if task is not None else nullcontext():
        if merged:
            if to == "gguf":
                gguf_model.check_model(model.config)
            report = merge(model)
            if packed := list(storages_in(model)):
                quantize(model, "dense", targets=packed)
            if to == "gguf":
                gguf_model.write(output, model, tokenizer)
            else:
                save_model(model, tokenizer, output, overwrite=overwrite)
            say(console, str(report))
            say(console, f"merged model   {output / gguf_model.FILE if to == 'gguf' else output}")
            return
        program = TARGETS[to]
        exact = mlx.with_gains(opened) if to == "mlx" and rank is None else None
        if exact is not None:
            chosen = max(len(factors.A) for factors in exact.values())
            program.write(output, opened, None, chosen)
            say(console, f"exact: DoRA of rank {chosen}, {counted(len(exact), 'module')}")
        else:
            ranks = vllm.RANKS if to == "vllm" else None
            name = program.PROGRAM
            changes = changes_of(opened, name, most=max(ranks) if ranks else None, experts=to == "vllm")
            chosen = rank_for(changes, ranks, rank, max_error, name)
            program.write(output, opened, changes, chosen)
            say(console, _said(changes, chosen))
    say(console, f"written        {output}")
    say(console, f"next           {program.next_step(output, path, chosen)}")


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
