"""From an adapter's folder to the folder of a merged model: plain, or in the storage that the base was trained in."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from rich.console import Console

from reparam.adapter.context import context
from reparam.adapter.merge import MergeReport, merge
from reparam.adapter.quantize import quantize, reports
from reparam.core.checks import listed
from reparam.hf.models import check_not_base, save_model
from reparam.hf.open import base_of, open_model
from reparam.io import files
from reparam.io.files import adapter_folder
from reparam.sites.walk import storages_in

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
) -> MergeReport:
    """Merge and write, and say onto what, into what, and what survived the rounding.

    `onto` is "trained", the base as the adapter was trained on it: quantized matrices are dequantized and the update
    added; or "original", the weights in the base's files, which the adapter has not seen where it was trained on
    quantized ones. `into` names the storage of a quantized base to write that again, see `reparam.merge`. `task` is the
    one that is merged of an adapter whose gates go by it.

    Raises ValueError for the base's own folder as output, for what cannot be combined, and for biases where the base
    has none, which its class would not read from the files.
    """
    if onto not in ONTO:
        raise ValueError(f"onto={onto!r}: expected one of {', '.join(ONTO)}")
    if into is not None and onto == "original":
        raise ValueError("--into writes the storage that the adapter was trained on, so it cannot go onto the original")
    folder = adapter_folder(adapter)
    path = base or base_of(files.read(folder), folder)
    check_not_base(output, path)
    model, tokenizer, _ = open_model(base, adapter, dtype=dtype, storage="dense" if onto == "original" else None)
    held = storages_in(model)
    names = ", ".join(sorted({storage.name for storage in held.values()}))
    with context(model, tasks=task) if task is not None else nullcontext():
        report = merge(model, into=into, rounding=rounding, force=force)
    if report.biased:
        new = listed([f"{site}.bias" for site in report.biased])
        raise ValueError(
            f"{path}: a {type(model).__name__} read from files has no place for {new}; keep this adapter apart, or use "
            f"the merged model in Python"
        )
    rest = list(storages_in(model))
    if rest and into is None:
        quantize(model, "dense", targets=rest)
    save_model(model, tokenizer, output)
    console.print(str(report), highlight=False, soft_wrap=True)
    console.print(f"merged onto    {_said(path, names, onto, into)}", highlight=False, soft_wrap=True)
    for quantized in reports(model):
        console.print(str(quantized), highlight=False, soft_wrap=True)
    console.print(f"merged model   {output}", highlight=False, soft_wrap=True)
    return report


def _said(path: str, storages: str, onto: str, into: str | None) -> str:
    if onto == "original":
        return f"the weights in {path} as they are in its files"
    if not storages:
        return path
    written = (
        f"rounded to {into} again" if into else f"dequantized; --onto original would add the update to {path} itself"
    )
    return f"{path} in {storages}, as the adapter was trained, {written}"
