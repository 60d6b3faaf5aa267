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

    def draws(self) -> Draws | None:
        """What draws the tokens; None for a greedy choice."""
        return None if self.temperature < COLDEST else Draws(self)


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
    """Gives the drawn token of each request that draws the highest score; transformers then takes the highest.

    `draws_of` gives what draws the tokens of a request, by its id, or None. `bad` is told of requests whose scores
    are not numbers.
    """

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012  (as the base class declares it)
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, draws_of: Callable[[str], Draws | None], bad: Callable[[str], None]) -> None:
        self._draws_of = draws_of
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
        """scores [R, V] -> the same, with an infinite score for each drawn token. Further rows are not used."""
        known = scores[: len(self._requests)]
        broken = known.isnan().any(1) | known.isposinf().any(1)
        for row in broken.nonzero().flatten().tolist():
            self._bad(self._requests[row])
        for row, request in enumerate(self._requests):
            draws = self._draws_of(request)
            if draws is not None and not broken[row]:
                scores[row, draws.next(scores[row])] = torch.inf
        return scores
