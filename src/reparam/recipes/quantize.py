"""From the folder of a model to the folder of the same model with its frozen matrices quantized."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

import reparam.weights  # noqa: F401  (fills its registry)
from reparam.adapter.quantize import reports
from reparam.core.registry import STORAGES
from reparam.hf.models import check_not_base, load_base, load_tokenizer, save_model
from reparam.train.base import BaseConfig


def quantize_to(output: Path, base: BaseConfig, *, format: str, console: Console) -> None:
    """Quantize while reading, write, and print what was quantized and what was left.

    Raises ValueError for a dense storage.
    """
    if base.quantization() is None:
        others = [name for name in STORAGES if name != "dense"]
        raise ValueError(f"storage 'dense' quantizes nothing; choose one of {', '.join(others)}")
    check_not_base(output, base.path)
    tokenizer = load_tokenizer(base.path, revision=base.revision)
    model = load_base(
        base.path, dtype=base.dtype, revision=base.revision, storage=base.quantization(), targets=base.quantized
    )
    save_model(model, tokenizer, output, format=format)
    if model.hf_quantizer.pre_quantized:  # type: ignore[union-attr]
        console.print(
            f"{base.path} was quantized already: written as it was, nothing was quantized anew", soft_wrap=True
        )
    for report in reports(model):
        console.print(str(report), highlight=False, soft_wrap=True)
    console.print(f"quantized model   {output}", highlight=False, soft_wrap=True)
