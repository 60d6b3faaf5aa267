"""From an adapter's folder to the folder of a plain merged model."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from reparam.hf import check_not_base, save_model
from reparam.merge import MergeReport, merge
from reparam.open import adapter_folder, base_of, open_model


def merge_to(output: Path, base: str | None, adapter: str, *, dtype: str, console: Console) -> MergeReport:
    """Merge and write, and say what survived the rounding. Raises ValueError for the base's own folder as output."""
    check_not_base(output, base or base_of(adapter_folder(adapter)))
    model, tokenizer, _ = open_model(base, adapter, dtype=dtype)
    report = merge(model)
    save_model(model, tokenizer, output)
    console.print(str(report), highlight=False, soft_wrap=True)
    console.print(f"merged model   {output}", highlight=False, soft_wrap=True)
    return report
