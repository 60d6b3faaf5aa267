"""Continue prompts in batches: greedily or by sampling, with one adapter or with one for each prompt."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reparam.adapter.context import context
from reparam.adapter.selection import select
from reparam.core.checks import finite, whole
from reparam.core.progress import tracked
from reparam.data.batches import padding_id
from reparam.hf.prompts import is_prompted
from reparam.hf.stops import stop_tokens, until_stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = {
    **dict.fromkeys(("output_hidden_states", "output_attentions", "output_scores", "output_logits"), False),
    "return_dict_in_generate": False,
}
"""Settings of generation that give the tokens alone, whatever the model's own configuration asks for."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. What is None is as the model's generation config says.

    Tokens are sampled if `temperature`, `top_p` or `top_k` is set, and `temperature` is not 0; otherwise the likeliest
    token is taken. Raises ValueError for a value out of range.

    >>> Sampling().greedy, Sampling(temperature=0.7).greedy, Sampling(temperature=0, top_p=0.9).greedy
    (True, False, True)
    """

    temperature: float | None = None
    """At least 0; the logits are divided by it. 0 takes the likeliest token."""
    top_p: float | None = None
    """Only the likeliest tokens whose probabilities reach this sum can be chosen; above 0, at most 1."""
    top_k: int | None = None
    """Only this number of the likeliest tokens can be chosen; 0 for all."""
    repetition_penalty: float | None = None
    """The logits of tokens that stand in the text are divided by it if positive, and multiplied otherwise; above 0."""
    seed: int = 0
    """Seed of the random numbers; the same call gives the same texts."""

    def __post_init__(self) -> None:
        ranges = (
            ("temperature", "a number of at least 0", lambda value: finite(value) and value >= 0),
            ("top_p", "a number above 0 and at most 1", lambda value: finite(value) and 0 < value <= 1),
            ("top_k", "a whole number of at least 0", lambda value: whole(value, 0)),
            ("repetition_penalty", "a number above 0", lambda value: finite(value) and value > 0),
            ("seed", "a whole number of at least 0", lambda value: whole(value, 0)),
        )
        for name, expected, right in ranges:
            value = getattr(self, name)
            if value is not None and not right(value):
                raise ValueError(f"{name}={value!r}: expected {expected}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return self.temperature == 0 or (self.temperature, self.top_p, self.top_k) == (None, None, None)

    def settings(self) -> dict[str, Any]:
        """The arguments of transformers' `generate`."""
        names = ("repetition_penalty",) if self.greedy else ("temperature", "top_p", "top_k", "repetition_penalty")
        given = {name: getattr(self, name) for name in names}
        return {"do_sample": not self.greedy, **{name: value for name, value in given.items() if value is not None}}


GREEDY = Sampling()


@torch.no_grad()
def complete(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    batch: int = 32,
    max_new_tokens: int = 64,
    tasks: Sequence[int | str] | None = None,
    adapters: Sequence[str | None] | None = None,
    sampling: Sampling = GREEDY,
    more: Callable[[Sequence[int], Tensor], Mapping[str, Any]] | None = None,
) -> list[str]:
    """Generate continuations of prompts, which are lists of token ids, up to the first of `stop_tokens`.

    Prompts are padded on the left, so that batching does not change greedy results. With prefix and prompt tuning,
    padding would separate the virtual tokens from the text, so each batch has prompts of one length and no padding.
    `tasks` are the names or numbers of the prompts' tasks, for an adapter that depends on them. `adapters` are the
    names of the prompts' adapters (None for the base), which are mixed in one batch; by default, all prompts use what
    is selected. `more` gives what the model takes beside the token ids, for the numbers of the prompts of a batch and
    their ids [B, T]. Raises ValueError for a prompt without tokens, and if the adapters cannot be mixed.
    """
    if not all(prompts):
        raise ValueError("a prompt has no tokens, so there is nothing to continue; give a prompt with text")
    device = next(model.parameters()).device
    pad, stops = padding_id(tokenizer), stop_tokens(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = [""] * len(prompts)
    training = model.training
    model.eval()
    with ExitStack() as seeded:
        if not sampling.greedy:
            seeded.enter_context(torch.random.fork_rng())
            torch.manual_seed(sampling.seed)
        chunks = list(_batches(order, [len(prompt) for prompt in prompts], batch, padded=not is_prompted(model)))
        for chosen in tracked(chunks, "generating answers", unit="batches"):
            width = max(len(prompts[i]) for i in chosen)
            free = {i: width - len(prompts[i]) for i in chosen}
            ids = torch.tensor([[pad] * free[i] + prompts[i] for i in chosen], device=device)
            mask = torch.tensor([[0] * free[i] + [1] * len(prompts[i]) for i in chosen], device=device)
            with ExitStack() as held:
                if adapters is not None:
                    names = [adapters[i] for i in chosen]
                    held.enter_context(select(model, names if len(set(names)) > 1 else names[0]))
                if tasks is not None:
                    held.enter_context(context(model, tasks=[tasks[i] for i in chosen]))
                out = model.generate(  # type: ignore[operator]
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=pad,
                    eos_token_id=stops or None,
                    **_on(device, more(chosen, ids) if more is not None else {}),
                    **PLAIN,
                    **sampling.settings(),
                )
            answers = [until_stop(row, stops) for row in out[:, width:].tolist()]
            for i, text in zip(chosen, tokenizer.batch_decode(answers, skip_special_tokens=True), strict=True):
                found[i] = text
    model.train(training)
    return found


def _on(device: torch.device, given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) for name, value in given.items()}


def _batches(order: Sequence[int], lengths: Sequence[int], size: int, *, padded: bool) -> Iterator[Sequence[int]]:
    """Split `order` into batches of up to `size` indices; unless `padded`, all prompts of a batch have one length."""
    groups = [order] if padded else [list(g) for _, g in itertools.groupby(order, key=lambda i: lengths[i])]
    for group in groups:
        for start in range(0, len(group), size):
            yield group[start : start + size]
