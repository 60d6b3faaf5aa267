"""What an engine is asked and what it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from reparam.serve.sampling import Choice


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, the adapter that answers it, and how its tokens are chosen."""

    prompt: str | Sequence[int]
    """Text, which the tokenizer encodes, or ids of tokens."""
    adapter: str | None = None
    """The name of an adapter; None for the base model."""
    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 takes the most likely token each time; above it, tokens are drawn."""
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    """With a seed, the same request gets the same tokens again."""
    stop_tokens: Sequence[int] | None = None
    """Ids that end the answer; None for those of the model and its tokenizer."""
    stop: Sequence[str] = ()
    """Texts that end the answer where the first of them begins. The answer's text does not hold it."""
    logprobs: int | None = None
    """With a number, each token has its log probability, and those of so many most likely tokens, from 0 to 20: natural
    logarithms of the model's own distribution, before temperature, top_k and top_p."""
    salt: str = ""
    """Only requests with the same salt share the keys and values of prompts that begin alike. A server gives each user
    a salt, because the time of an answer shows whether a prompt was there before."""

    @property
    def choice(self) -> Choice:
        """How the tokens are chosen."""
        return Choice(self.temperature, self.top_k, self.top_p, self.seed, self.logprobs)


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of an answer."""

    id: int
    text: str
    """What it adds to the text. It is empty for a stop token, while a character is not complete, and while the text
    could be the beginning of a text in `Request.stop`."""
    logprob: float | None = None
    """The natural logarithm of its probability, if the request asked for it."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens with their log probabilities, the most likely one first."""


@dataclasses.dataclass(frozen=True)
class Usage:
    """The tokens of a request."""

    prompt: int
    cached: int
    """Tokens of the prompt whose keys and values an earlier request had computed."""
    new: int


@dataclasses.dataclass(frozen=True)
class Answer:
    """A whole answer."""

    tokens: list[Token]
    """All new tokens, with the stop token if one ended the answer."""
    text: str
    """Their text, without the stop token and from a text in `Request.stop` on; empty without a tokenizer."""
    end: Literal["stop", "length"]
    digest: str | None
    """The digest of the adapter that answered; None for the base."""
    usage: Usage

    @property
    def ids(self) -> list[int]:
        """The ids of all new tokens."""
        return [token.id for token in self.tokens]
