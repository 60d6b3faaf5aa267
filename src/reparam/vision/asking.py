"""Ask a saved model that sees, and score it on rows with images: `reparam generate --image`, `reparam eval`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from reparam.adapter.selection import select
from reparam.data.batches import padding_id
from reparam.data.encode import encode
from reparam.data.framing import frame
from reparam.evaluation.complete import Sampling
from reparam.evaluation.evaluate import Evaluation
from reparam.hf.models import vocabulary
from reparam.images.rows import ImageRows, Images
from reparam.vision.files import load
from reparam.vision.found import vora_folder
from reparam.vision.model import VoRA
from reparam.vision.processor import mark_id
from reparam.vision.rows import Seen
from reparam.vision.scores import scored


def opened(base: str | None, adapters: Sequence[str], *, dtype: str) -> VoRA:
    """The model that sees in one of these folders; if it is an adapter, `base` may name its base.

    Raises ValueError if none of the folders holds one, and for several adapters.
    """
    if len(adapters) > 1:
        raise ValueError("several adapters cannot answer about images; give one")
    if adapters and vora_folder(adapters[0]) is not None:
        return load(adapters[0], base=base, dtype=dtype)
    if base is not None and vora_folder(base) is not None:
        if adapters:
            raise ValueError(f"--adapter {adapters[0]}: holds no model that sees; leave it out, or leave out --image")
        return load(base, dtype=dtype)
    given = adapters[0] if adapters else base
    if given is None:
        raise ValueError(
            "neither a base model nor an adapter is given; pass the folder of a model that sees with --base"
        )
    raise ValueError(
        f"{given}: holds no model that sees; teach one with `reparam vision pretrain`, or leave out --image"
    )


def ask(
    prompt: str | None,
    images: Sequence[str],
    base: str | None,
    adapters: Sequence[str],
    raw: bool | None,
    sampling: Sampling,
    max_new_tokens: int,
    dtype: str,
) -> str:
    """The answer to a prompt with images, as `reparam generate` gives it. Raises ValueError for a missing prompt."""
    if prompt is None:
        raise ValueError('a model that sees needs a prompt: reparam generate --image cat.png "What is this?"')
    vora = opened(base, adapters, dtype=dtype)
    with torch.random.fork_rng():
        torch.manual_seed(sampling.seed)
        settings = sampling.settings()
        return str(vora.generate(prompt, list(images), raw=raw, max_new_tokens=max_new_tokens, **settings))


def evaluate_seeing(
    data: Path, base: str | None, adapter: str | None, *, dtype: str, max_length: int, batch: int
) -> Evaluation:
    """Score a saved model that sees on the rows of a file; one whose adapter is not merged is compared with its base.

    Raises DataError for rows that cannot be used, and ValueError and FormatError as loading does.
    """
    found: dict[str, Images] = {}
    rows = list(ImageRows([data], found=found))
    vora = opened(base, [adapter] if adapter is not None else [], dtype=dtype)
    processor = vora.processor
    assert processor is not None
    told = processor.prompt_format
    if told is not None:
        rows = list(frame(processor.marked, system=told.system, thinking=told.thinking, key="the model's ").rows(rows))
    mark = mark_id(processor.marked)
    size = max(vocabulary(vora.language), mark + 1)
    encoded = encode(rows, processor.marked, max_length=max_length, vocab_size=size)
    fill = padding_id(processor.tokenizer)
    seen = Seen(encoded, found, vora.vision, mark=mark, fill=fill, longest=max_length)
    score = functools.partial(scored, vora, seen, rows, batch=batch, answers=len(rows))
    if vora.adapter is None:
        return Evaluation(score()[0], None, ())
    with select(vora.language, None):
        before, plain = score()
    after, adapted = score()
    return Evaluation(before, after, tuple(zip(plain, adapted, strict=True)))
