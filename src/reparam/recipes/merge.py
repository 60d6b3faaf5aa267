"""Merge a saved adapter into its base, and write the merged model to a folder, dense or quantized again."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from torch import nn

from reparam.adapter.adapter import Adapter
from reparam.adapter.context import context
from reparam.adapter.merge import MergeReport, merge
from reparam.adapter.quantize import quantize, reports
from reparam.core.checks import listed
from reparam.evaluation.terminal import say
from reparam.hf.models import check_not_base, save_model
from reparam.hf.open import base_of, open_model
from reparam.io import files
from reparam.io.files import adapter_folder
from reparam.io.outputs import check_apart, check_model_folder
from reparam.recipes.task import check_task
from reparam.sites.walk import storages_in
from reparam.vision.found import vora_folder

ONTO = ("trained", "original")


def merge_to(
    output: Path,
    base: str | None,
    adapter: str,
    *,
    dtype: str,
    console: Console,
    onto: str = "trained",
    into: str | None = None,
    rounding: str = "aware",
    force: bool = False,
    task: str | None = None,
    overwrite: bool = False,
) -> MergeReport:
    """Merge the adapter, write the model, and print how much of the update survived rounding.

    Args:
        output: folder of the merged model.
        base: folder or Hub id of the base; None for the one in the adapter's file.
        adapter: folder of the adapter or of its training run.
        dtype: dtype of the base, or "auto".
        console: prints the report.
        onto: "trained" adds the update to the weights that the adapter was trained on, dequantized if necessary;
            "original" adds it to the weights in the base's files, which may differ from those.
        into: name of the storage of a quantized base, to quantize the merged weights again; see `reparam.merge`.
        rounding: as in `reparam.merge`.
        force: as in `reparam.merge`.
        task: the task to merge, for a mixture adapter whose gates depend on it.
        overwrite: replace a model in `output`.

    Raises ValueError if `output` is not empty (unless `overwrite` is set and it holds a model) or the folder of the
    base, the settings exclude each other, or the adapter adds biases that the model's class would not read from files,
    and the errors of `reparam.merge`.
    """
    if onto not in ONTO:
        raise ValueError(f"onto={onto!r}: expected one of {', '.join(ONTO)}")
    if into is not None and onto == "original":
        raise ValueError(
            "--into needs the quantized weights that the adapter was trained on, so leave out --onto original"
        )
    if vora_folder(adapter) is not None:
        raise ValueError(
            f"{adapter}: is a model that sees; merge it with `reparam vision merge {output} --from {adapter}`"
        )
    path = checked_base(output, base, adapter, task)
    check_model_folder(output, overwrite=overwrite)
    model, tokenizer, opened = open_model(base, adapter, dtype=dtype, storage="dense" if onto == "original" else None)
    names = ", ".join(sorted({storage.name for storage in storages_in(model).values()}))
    report = merged(model, opened, path, into=into, rounding=rounding, force=force, task=task)
    save_model(model, tokenizer, output, overwrite=overwrite)
    say(console, str(report))
    say(console, f"merged onto    {_said(path, names, onto, into)}")
    for quantized in reports(model):
        say(console, str(quantized))
    say(console, f"merged model   {output}")
    return report


def checked_base(output: Path, base: str | None, adapter: str, task: str | None) -> str:
    """Folder or hub id of the base: `base`, or the one in the adapter's file.

    Raises ValueError if `output` is the folder of the base or of the adapter or lies in one, and if the adapter has no
    tasks and one is given; FormatError if neither `base` nor the adapter names the base.
    """
    check_task(task, adapter)
    folder = adapter_folder(adapter)
    path = base or base_of(files.read(folder), folder)
    check_not_base(output, path)
    check_apart(output, [folder], "the adapter")
    return path


def merged(
    model: nn.Module,
    adapter: Adapter | None,
    path: str,
    *,
    into: str | None = None,
    rounding: str = "aware",
    force: bool = False,
    task: str | None = None,
) -> MergeReport:
    """Merge the adapter on this model of the base `path`, and dequantize what is still quantized, unless `into` is set.

    Raises ValueError if the adapter adds biases that the model's class would not read from files, and the errors of
    `reparam.merge`.
    """
    if adapter is not None and (new := _new_biases(adapter)):
        raise ValueError(
            f"{path}: a {type(model).__name__} cannot load {listed(new)} from files; use the adapter without merging "
            f"it, or call reparam.merge in Python"
        )
    with context(model, tasks=task) if task is not None else nullcontext():
        report = merge(model, into=into, rounding=rounding, force=force)
    rest = list(storages_in(model))
    if rest and into is None:
        quantize(model, "dense", targets=rest)
    return report


def _new_biases(adapter: Adapter) -> list[str]:
    """The biases that the merged model would have and the base has not."""
    return [
        f"{path}.bias"
        for path, module in adapter.modules.items()
        if module.bias is None
        and (adapter.name in module.biases or module.updates[adapter.name].bias_delta() is not None)  # type: ignore[operator]
    ]


def _said(path: str, storages: str, onto: str, into: str | None) -> str:
    if onto == "original":
        return f"the original weights in the files of {path}"
    if not storages:
        return path
    written = (
        f"quantized to {into} again" if into else f"dequantized; --onto original would use the files of {path} instead"
    )
    return f"{path} in {storages}, as in training, {written}"
