"""Positions in front of the text that train, while no weight changes: prefix tuning and prompt tuning.

    prefix    keys and values of t positions, in every layer (Li & Liang 2021, arXiv 2101.00190, §4)
    prompt    the embeddings of t tokens (Lester, Al-Rfou & Constant 2021, arXiv 2104.08691, §2)

They change no matrix, so that they go on no site: PEFT holds them (`reparam.hf.prompts`), and `reparam train` runs
both. The t positions are taken from the model's context, and a prompt's are computed like any other token. A fresh
prefix is not the base: softmax gives the new positions a share of the attention, whatever they hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from reparam.core.base import Site
from reparam.core.checks import whole
from reparam.core.method import Method
from reparam.core.registry import method


@dataclasses.dataclass(frozen=True)
class Prompting(Method):
    """What the two have in common. Raises ValueError for less than one token."""

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ()
    changes_weights: ClassVar[bool] = False
    peft_config: ClassVar[str]
    """Name of the class in PEFT that configures it."""
    peft_settings: ClassVar[Mapping[str, Any]] = {}
    """What that is told beside the number of tokens."""

    tokens: int = 20
    """How many positions are put in front of the text."""
    seed: int = 0
    """Seed of what they begin at."""

    def __post_init__(self) -> None:
        if not whole(self.tokens, 1):
            raise ValueError(f"{self.name}: tokens={self.tokens!r}: expected a whole number of at least 1")

    def unsupported_reason(self, site: Site) -> str:
        """Nothing is a site of it."""
        return f"{self.name} adds positions and changes no weight; use reparam.prompts.attach, or reparam train"


@method("prefix")
@dataclasses.dataclass(frozen=True)
class Prefix(Prompting):
    """Prefix tuning: keys and values, in every layer, without the paper's projection.

    >>> Prefix(tokens=10)
    Prefix(tokens=10, seed=0)
    >>> import torch, reparam
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> reparam.attach(model, Prefix(tokens=10), targets=["0"])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: prefix cannot go on 0: ... changes no weight; use reparam.prompts.attach, or reparam train
    """

    peft_config: ClassVar[str] = "PrefixTuningConfig"


@method("prompt")
@dataclasses.dataclass(frozen=True)
class Prompt(Prompting):
    """Prompt tuning: embeddings that begin at those of tokens drawn from the vocabulary.

    >>> Prompt(tokens=10)
    Prompt(tokens=10, seed=0)
    >>> import torch, reparam
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> reparam.attach(model, Prompt(tokens=10), targets=["0"])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: prompt cannot go on 0: ... changes no weight; use reparam.prompts.attach, or reparam train
    """

    peft_config: ClassVar[str] = "PromptTuningConfig"
    peft_settings: ClassVar[Mapping[str, Any]] = {"prompt_tuning_init": "SAMPLE_VOCAB"}
