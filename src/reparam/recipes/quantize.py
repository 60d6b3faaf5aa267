"""Write a copy of a model with quantized matrices to a folder."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

import reparam.weights  # noqa: F401  (importing it registers the storages)
from reparam.adapter.quantize import reports
from reparam.core.registry import STORAGES
from reparam.evaluation.terminal import say
from reparam.hf.models import check_not_base, load_base, load_tokenizer, save_model
from reparam.hf.tasks import own_head
from reparam.io.outputs import check_model_folder
from reparam.train.base import BaseConfig


def quantize_to(output: Path, base: BaseConfig, *, format: str, console: Console, overwrite: bool = False) -> None:
    """Quantize the model while loading it, write it to `output`, and print the sizes of its matrices.

    Raises ValueError if the storage is dense, if `output` is the folder of the base, and if it is not empty, unless
    `overwrite` is set and it holds a model.
    """
    if base.quantization() is None:
        others = [name for name in sorted(STORAGES) if name != "dense"]
        raise ValueError(f"storage 'dense' does not quantize; choose one of {', '.join(others)}")
    check_not_base(output, base.path)
    check_model_folder(output, overwrite=overwrite)
    tokenizer = load_tokenizer(base.path, revision=base.revision)
    model = load_base(
        base.path,
        dtype=base.dtype,
        revision=base.revision,
        storage=base.quantization(),
        targets=base.quantized,
        head=own_head(base.path, revision=base.revision),
    )
    save_model(model, tokenizer, output, format=format, overwrite=overwrite)
    if model.hf_quantizer.pre_quantized:  # type: ignore[union-attr]
        say(console, f"{base.path} was already quantized; its quantized matrices were copied unchanged")
    for report in reports(model):
        say(console, str(report))
    say(console, f"quantized model   {output}")
