"""Write a copy of a model with quantized matrices to a folder."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

import reparam.weights  # noqa: F401  (importing it registers the storages)
from reparam.adapter.quantize import reports
from reparam.core.registry import STORAGES
from reparam.hf.models import check_not_base, load_base, load_tokenizer, save_model
from reparam.train.base import BaseConfig


def quantize_to(output: Path, base: BaseConfig, *, format: str, console: Console) -> None:
    """Quantize the model while loading it, write it to `output`, and print the sizes of its matrices.

    Raises ValueError if the storage is dense, or if `output` is the folder of the base.
    """
    if base.quantization() is None:
        others = [name for name in sorted(STORAGES) if name != "dense"]
        raise ValueError(f"storage 'dense' does not quantize; choose one of {', '.join(others)}")
    check_not_base(output, base.path)
    tokenizer = load_tokenizer(base.path, revision=base.revision)
    model = load_base(
        base.path, dtype=base.dtype, revision=base.revision, storage=base.quantization(), targets=base.quantized
    )
    save_model(model, tokenizer, output, format=format)
    if model.hf_quantizer.pre_quantized:  # type: ignore[union-attr]
        console.print(
            f"{base.path} was already quantized; its quantized matrices were copied unchanged", soft_wrap=True
        )
    for report in reports(model):
        console.print(str(report), highlight=False, soft_wrap=True)
    console.print(f"quantized model   {output}", highlight=False, soft_wrap=True)
