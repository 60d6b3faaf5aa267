"""Scores on held-out preferences: how much more an adapter rewards good answers than bad ones.

The reward of an answer is β times the log-probability that the model gives it beyond that of a reference model or,
without a reference, β times its mean log-probability per token. Rewards are compared, so only their differences matter.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reparam.data.preferences import Preferences
from reparam.evaluation.score import Score, share, token_losses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ACCURACY, MARGIN = "reward accuracy", "reward margin"


def log_probabilities(
    model: nn.Module, preferences: Preferences, tokenizer: PreTrainedTokenizerBase, *, batch: int
) -> tuple[Tensor, Tensor]:
    """The log-probability in nats and the number of tokens of each answer, both [E] float64."""
    nats, tokens = token_losses(model, preferences.encoded, tokenizer, batch=batch)
    return -nats, tokens


def score_rewards(rewards: Tensor, preferences: Preferences) -> tuple[Score, ...]:
    """The margin and the accuracy of the rewards [E] of all answers, each with its 95 % interval.

    Of pairs, the margin is the mean of the chosen answer's reward minus the rejected one's, and the accuracy the share
    of pairs in which it is above 0. Of single answers, the margin is the mean reward of the good ones minus that of the
    bad ones, and the accuracy the share of answers whose reward is above 0 if they are good, and below if they are bad.
    An answer at 0 counts half. There is no margin without both good and bad answers.

    >>> from types import SimpleNamespace
    >>> pairs = SimpleNamespace(paired=True, good=torch.tensor([True, False] * 2))
    >>> [score.value for score in score_rewards(torch.tensor([1.0, 0.0, 2.0, 3.0]), pairs)]
    [0.0, 0.5]
    """
    good = preferences.good
    if preferences.paired:
        margins = rewards[good] - rewards[~good]  # [P]
        mean, error = float(margins.mean()), _error(margins)
        right = _above(margins)
    else:
        mean = float(rewards[good].mean() - rewards[~good].mean())
        error = math.hypot(_error(rewards[good]), _error(rewards[~good]))
        right = _above(torch.where(good, rewards, -rewards))
    scores = [share(ACCURACY, float(right.sum()), len(right))]
    if not math.isnan(mean):
        half = 1.96 * error
        scores.insert(0, Score(MARGIN, mean, mean - half, mean + half, len(right), larger_is_better=True))
    return tuple(scores)


def _above(values: Tensor) -> Tensor:
    """1 where a value is above 0, 1/2 where it is 0, else 0."""
    return ((values > 0).double() + (values >= 0).double()) / 2


def _error(values: Tensor) -> float:
    """The standard error of the mean; 0 for less than two values."""
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
