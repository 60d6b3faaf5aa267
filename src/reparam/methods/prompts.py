"""Prefix tuning and prompt tuning: train virtual tokens in front of the text, and change no weight.

    prefix    keys and values of t virtual tokens, in every layer (Li & Liang 2021, arXiv 2101.00190, §4)
    prompt    the embeddings of t virtual tokens (Lester, Al-Rfou & Constant 2021, arXiv 2104.08691, §2)

They change no matrix and therefore have no sites: PEFT holds their parameters (`reparam.hf.prompts`), and `reparam
train` trains both. The virtual tokens take t positions of the model's context. Those of a prompt also pass through all
layers, as other tokens do. A new prefix already changes the model's output, because softmax gives its keys some of the
attention.
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
    """Base class of prefix and prompt tuning. Raises ValueError if `tokens` is not a whole number of at least 1."""

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ()
    changes_weights: ClassVar[bool] = False
    peft_config: ClassVar[str]
    """Name of its configuration class in PEFT."""
    peft_settings: ClassVar[Mapping[str, Any]] = {}
    """Settings of that class other than the number of virtual tokens."""

    tokens: int = 20
    """Number of virtual tokens in front of the text."""
    seed: int = 0
    """Seed of the initial values."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not whole(self.tokens, 1):
            raise ValueError(f"{self.name}: tokens={self.tokens!r}: expected a whole number of at least 1")

    def unsupported_reason(self, site: Site) -> str:
        """A reason for every site: this method changes no weight."""
        return f"{self.name} adds positions and changes no weight; use reparam.prompts.attach, or reparam train"


@method("prefix")
@dataclasses.dataclass(frozen=True)
class Prefix(Prompting):
    """Prefix tuning (Li & Liang 2021, arXiv 2101.00190): trains keys and values of virtual tokens in every layer.

    The paper's reparameterization by an MLP is not used.

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
    """Prompt tuning (Lester et al. 2021, arXiv 2104.08691): trains the embeddings of virtual tokens.

    They start at the embeddings of random tokens of the vocabulary.

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
