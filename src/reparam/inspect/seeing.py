"""`reparam inspect` of a model that sees: its parts, its adapter or language model, and the attention of an answer."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from reparam.errors import BaseError, FormatError
from reparam.evaluation.terminal import say
from reparam.hf.embedding import sizes_of
from reparam.hf.open import base_of
from reparam.inspect import looking
from reparam.inspect.show import show
from reparam.io import files
from reparam.io.native import parse_tensors, read_bytes
from reparam.io.outputs import check_files
from reparam.vision.attention import attention
from reparam.vision.files import TENSORS, load, read_settings
from reparam.vision.found import ADAPTER, LANGUAGE


def show_seeing(
    folder: Path,
    base: str | None,
    console: Console,
    *,
    images: Sequence[str],
    prompt: str | None,
    plot: Path | None,
    json: bool,
    **how: Any,
) -> None:
    """Print what a model that sees is made of, then what `show` prints of its adapter or of its language model.

    With `images` and `prompt`, the model answers, and a picture of the attention of the answer is written into the
    folder `plot`. Raises ValueError if one of the three is missing, and as `load`, `attention` and `show` do.
    """
    looking.check_images(images, prompt, plot)
    if plot is not None and images:
        check_files(plot, [looking.PLOT], overwrite=how["overwrite"])
    settings = read_settings(folder)
    tensors = parse_tensors(read_bytes(folder / TENSORS), folder / TENSORS)
    merged = (folder / LANGUAGE).is_dir()
    part = folder / (LANGUAGE if merged else ADAPTER)
    depth = _depth(part, base)
    more: dict[str, Any] = {"vision": looking.as_json(settings, tensors, depth=depth)}
    if not json:
        for line in looking.lines(settings, tensors, depth=depth):
            say(console, line)
    if images:
        assert plot is not None
        seen = attention(load(folder, base=base, attention="eager"), prompt, list(images))
        more["attention"] = looking.attention_json(seen)
        looking.plot(seen, plot / looking.PLOT)
        if not json:
            for line in looking.attention_lines(seen):
                say(console, line)
            say(console, f"picture     {plot / looking.PLOT}")
    show(part, base, console, json=json, plot=None if merged and images else plot, more=more, **how)


def _depth(part: Path, base: str | None) -> int | None:
    """The number of blocks of the language model; None if it is not on this machine."""
    with contextlib.suppress(BaseError, FormatError):
        path = str(part) if part.name == LANGUAGE else base or base_of(files.read(part), part)
        return sizes_of(path).blocks if Path(path).is_dir() else None
    return None
