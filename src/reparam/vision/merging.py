"""Merge the adapter of a saved model that sees, and write the merged model."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from reparam.adapter.quantize import quantize
from reparam.errors import FormatError
from reparam.evaluation.terminal import say
from reparam.hf.models import check_not_base
from reparam.hf.open import base_of
from reparam.io import files
from reparam.io.outputs import check_apart
from reparam.sites.walk import storages_in
from reparam.vision.files import check_vora_folder, load, save
from reparam.vision.found import ADAPTER, LANGUAGE, vora_folder


def merge_to(output: Path, run: str | Path, *, base: str | None, dtype: str, overwrite: bool, console: Console) -> None:
    """Merge the adapter, write the model, and print how much of the update survived rounding.

    Quantized matrices are dequantized. Raises FormatError if `run` holds no model that sees, or one that is merged, and
    ValueError if `output` is not empty (unless `overwrite` is set and it holds such a model alone), or lies in the
    folder of the run or of the base.
    """
    folder = vora_folder(run)
    if folder is None:
        raise FormatError(f"{run}: no model that sees; give the folder of a run of `reparam vision pretrain` or `tune`")
    if (folder / LANGUAGE).is_dir():
        raise FormatError(f"{run}: is merged already")
    path = base or base_of(files.read(folder / ADAPTER), folder / ADAPTER)
    check_not_base(output, path)
    check_apart(output, [folder, Path(run)], "the run")
    check_vora_folder(output, overwrite=overwrite)
    vora = load(folder, base=base, dtype=dtype)
    report = vora.merge()
    if rest := list(storages_in(vora.language)):
        quantize(vora.language, "dense", targets=rest)
    save(vora, output, overwrite=overwrite)
    say(console, str(report))
    say(console, f"merged onto     {path}")
    own = sum(p.numel() for p in vora.embedding.parameters())
    say(console, f"model           {output}, the language model with a patch embedding of {own:,} parameters")
    say(console, f"language model  {output / LANGUAGE}, a plain folder that any tool loads")
