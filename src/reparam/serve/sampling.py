"""How the next tokens of the requests in a step are chosen: greedily, or drawn with settings and a seed of their own.

Every request draws from a generator of its own, so its tokens do not depend on the other requests in the step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

COLDEST = 1e-6
"""Temperatures below it take the token with the highest score: scores divided by it would not be finite."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """How the tokens of one request are chosen."""

    temperature: float = 0.0
    """0 for the token with the highest score; above it, tokens are drawn."""
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    logprobs: int | None = None
    """Of how many most likely tokens log probabilities are wanted, besides the chosen one; None for none at all."""

    def picker(self) -> Picker | None:
        """What picks the tokens; None if the one with the highest score is all that is wanted."""
        draws = None if self.temperature < COLDEST else Draws(self)
        return None if draws is None and self.logprobs is None else Picker(draws, self.logprobs)


@dataclasses.dataclass(frozen=True)
class Scored:
    """Natural logarithms of probabilities, in the model's own distribution."""

    logprob: float
    """That of the chosen token."""
    top: tuple[tuple[int, float], ...]
    """The most likely tokens with theirs."""


class Picker:
    """Picks the tokens of one request, and notes their log probabilities if they are wanted."""

    def __init__(self, draws: Draws | None, logprobs: int | None) -> None:
        self._draws = draws
        self._logprobs = logprobs
        self.scored: list[Scored] = []
        """One for each token, if log probabilities are wanted."""

    def next(self, scores: Tensor) -> int:
        """Pick a token, given its scores [V]."""
        token = int(scores.argmax()) if self._draws is None else self._draws.next(scores)
        if self._logprobs is not None:
            shares = scores.float().log_softmax(-1)
            best = shares.topk(min(self._logprobs, len(shares)))
            top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            self.scored.append(Scored(float(shares[token]), tuple(top)))
        return token


class Draws:
    """Draws the tokens of one request, as `generate` does after `torch.manual_seed(seed)`."""

    def __init__(self, choice: Choice) -> None:
        self.generator = torch.Generator()
        if choice.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(choice.seed)
        self.warpers = LogitsProcessorList()
        if choice.temperature != 1:
            self.warpers.append(TemperatureLogitsWarper(float(choice.temperature)))
        if choice.top_k:
            self.warpers.append(TopKLogitsWarper(choice.top_k))
        if choice.top_p is not None and choice.top_p < 1:
            self.warpers.append(TopPLogitsWarper(float(choice.top_p)))

    def next(self, scores: Tensor) -> int:
        """Draw a token, given its scores [V]."""
        scores = scores.float().cpu()[None]
        # The largest score becomes 0, so that no temperature makes it infinite.
        none: Any = torch.empty(1, 0, dtype=torch.int64)  # the tokens so far, which no warper reads
        shares = self.warpers(none, scores - scores.max()).softmax(-1)
        return int(torch.multinomial(shares, 1, generator=self.generator))


class Sampling(ContinuousBatchingLogitsProcessor):
    """Gives the picked token of each request that has a picker the highest score; transformers then takes the highest.

    `picker_of` gives what picks the tokens of a request, by its id, or None. `bad` is told of requests whose scores are
    not numbers.
    """

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012  (as the base class declares it)
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, picker_of: Callable[[str], Picker | None], bad: Callable[[str], None]) -> None:
        self._picker_of = picker_of
        self._bad = bad
        self._requests: list[str] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Set the argument of transformers' processors, which is not used."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """Note which requests get a new token in the step."""
        self._requests = [request.state.request_id for request in requests_with_new_token]
        return torch.zeros(len(self._requests), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """scores [R, V] -> the same, with an infinite score for each picked token. Further rows are not used."""
        known = scores[: len(self._requests)]
        broken = known.isnan().any(1) | known.isposinf().any(1)
        bad = set(broken.nonzero().flatten().tolist())
        for row in bad:
            self._bad(self._requests[row])
        for row, request in enumerate(self._requests):
            picker = self._picker_of(request)
            if picker is not None and row not in bad:
                scores[row, picker.next(scores[row])] = torch.inf
        return scores
