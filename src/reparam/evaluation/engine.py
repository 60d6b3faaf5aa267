"""Answers through the serving engine: rows join and leave one batch, each with an adapter of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from reparam.adapter.attach import remove
from reparam.hf.stops import stop_tokens, until_stop
from reparam.io.files import adapter_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reparam.serve import Engine

ROOM = 16_384
"""Tokens for which the engine's cache has room, at least."""


@contextmanager
def opened(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folders: Mapping[str, str | Path], *, longest: int
) -> Iterator[Engine]:
    """An engine over a model, whose adapters are removed, with the adapters in these folders by name.

    `longest` is the number of tokens of the longest prompt and its answer. Raises ValueError if the extra `serve` is
    not installed, or an adapter cannot be in one batch with others.
    """
    try:
        from reparam.serve import Engine, Limits
    except ImportError as error:
        raise ValueError(
            f"the engine needs {error.name or 'a package'}, which is not installed: pip install 'reparam[serve]'"
        ) from None
    state: Any = getattr(model, "reparam_state", None)
    for name in list(state.adapters) if state is not None else []:
        remove(model, name)
    with Engine(model, tokenizer, limits=Limits(cache_tokens=max(ROOM, 4 * longest))) as engine:
        for name, folder in folders.items():
            engine.load(name, adapter_folder(folder))
        yield engine


def answers_of(
    engine: Engine,
    prompts: Sequence[list[int]],
    adapters: Sequence[str | None],
    *,
    max_new_tokens: int,
    stops: Sequence[Sequence[int]] | None = None,
) -> list[str]:
    """Greedy continuations of prompts, which are lists of token ids, each with the adapter of this name.

    `stops` are the tokens that end each answer; by default, those of the engine's model and tokenizer. The answers have
    the tokens that `complete` gives, but for rounding. Raises ValueError for a prompt without tokens.
    """
    from reparam.serve import Request

    if not all(prompts):
        raise ValueError("a prompt has no tokens, so there is nothing to continue; give a prompt with text")
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    stops = stops or [stop_tokens(engine.model, tokenizer)] * len(prompts)
    asked = zip(prompts, adapters, stops, strict=True)
    requests = [Request(ids, name, max_new_tokens, stop_tokens=ends) for ids, name, ends in asked]
    found = [until_stop(one.ids, ends) for one, ends in zip(engine.answer(requests), stops, strict=True)]
    texts: list[str] = tokenizer.batch_decode(found, skip_special_tokens=True)
    return texts


def check_greedy(**settings: object) -> None:
    """Raise ValueError if a setting asks for more than the likeliest tokens."""
    given = [f"--{name.replace('_', '-')}" for name, value in settings.items() if value is not None]
    if given:
        raise ValueError(
            f"--engine takes the likeliest token each time, so {' and '.join(given)} would have no effect; leave "
            f"{'it' if len(given) == 1 else 'them'} out, or leave --engine out"
        )
