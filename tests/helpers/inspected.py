"""A trained adapter in a folder, and what `inspect` prints of it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import models
import torch
from rich.console import Console

import reparam
from reparam.inspect.show import show


def saved(folder: Path, method: Any, **settings: Any) -> reparam.Adapter:
    """A trained adapter of a base that is saved beside it."""
    models.save_base(folder / "base")
    from reparam.hf.models import load_base

    adapter = reparam.attach(load_base(str(folder / "base")), method, **settings)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    adapter.requires_grad_(False).save(folder / "adapter")
    return adapter


def told(folder: Path, **options: Any) -> str:
    text = io.StringIO()
    base = options.pop("base", None)
    show(folder / "adapter", base, Console(file=text, width=100, force_terminal=options.pop("ansi", False)), **options)
    return text.getvalue()
