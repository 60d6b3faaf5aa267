"""What is checked of a request before the engine takes it.

An exception in a step ends all requests in it, so nothing that could raise one may come that far.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from reparam.errors import Refused
from reparam.serve.sampling import Choice

MOST_SEED = 2**63 - 1
MOST_LOGPROBS = 20
MOST_STOPS = 64
LONGEST_STOP = 1024


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What the model and the engine can compute."""

    vocabulary: int
    """The number of token ids."""
    context: int | None
    """The positions that the model knows; None if its configuration does not state them."""
    cache: int
    """The tokens, of prompt and answer together, for which the engine's cache has room."""

    @property
    def longest(self) -> int:
        """The most tokens of prompt and answer together."""
        return self.cache if self.context is None else min(self.cache, self.context)


def check_prompt(ids: Sequence[int], most: int, bounds: Bounds) -> None:
    """Raise Refused unless a prompt of these ids, with up to `most` new tokens, can be computed."""
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise Refused(f"max_new_tokens={most!r}: expected a whole number, 1 or more")
    if not ids:
        raise Refused("the prompt has no tokens; give at least one")
    for place, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < bounds.vocabulary:
            raise Refused(
                f"token {place} of the prompt is {token!r}: expected a whole number from 0 to {bounds.vocabulary - 1}, "
                f"the ids of the model's vocabulary"
            )
    held, whose = bounds.cache, "the engine's cache holds (Limits.cache_tokens)"
    if bounds.context is not None and bounds.context < held:
        held, whose = bounds.context, "the model's context holds (max_position_embeddings)"
    if len(ids) + most > held:
        raise Refused(
            f"the prompt has {len(ids):,} tokens and max_new_tokens is {most:,}, together more than the {held:,} that "
            f"{whose}; shorten the prompt, or lower max_new_tokens"
        )


def check_choice(choice: Choice) -> None:
    """Raise Refused unless tokens can be chosen with these settings."""
    if not _is_number(choice.temperature) or not 0 <= choice.temperature <= 100:
        raise Refused(f"temperature={choice.temperature!r}: expected a number from 0 (greedy) to 100")
    top_k, top_p, seed = choice.top_k, choice.top_p, choice.seed
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise Refused(f"top_k={top_k!r}: expected a whole number, 1 or more; leave it out to draw from all tokens")
    if top_p is not None and not (_is_number(top_p) and 0 < top_p <= 1):
        raise Refused(f"top_p={top_p!r}: expected a number above 0, up to 1")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MOST_SEED):
        raise Refused(f"seed={seed!r}: expected a whole number from 0 to {MOST_SEED}")

    logprobs = choice.logprobs
    if logprobs is not None and (isinstance(logprobs, bool) or not isinstance(logprobs, int) or logprobs < 0):
        raise Refused(f"logprobs={logprobs!r}: expected a whole number from 0 to {MOST_LOGPROBS}, or None for none")
    if logprobs is not None and logprobs > MOST_LOGPROBS:
        raise Refused(f"logprobs={logprobs}: expected at most {MOST_LOGPROBS} tokens")


def check_stops(stops: Sequence[int] | None) -> None:
    """Raise Refused unless these are ids of tokens, or None."""
    for token in stops or ():
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise Refused(f"stop_tokens holds {token!r}: expected ids of tokens, whole numbers from 0")


def check_texts(stops: Sequence[str], salt: str, has_tokenizer: bool) -> None:
    """Raise Refused unless an answer can be stopped at these texts, and its cached keys have this salt."""
    if isinstance(stops, str):
        raise Refused(f"stop={stops!r}: expected a list of texts, such as [{stops!r}]")
    if len(stops) > MOST_STOPS:
        raise Refused(f"stop has {len(stops)} texts; expected at most {MOST_STOPS}")
    for place, stop in enumerate(stops):
        if not isinstance(stop, str) or not 1 <= len(stop) <= LONGEST_STOP:
            raise Refused(f"stop[{place}] is {_short(stop)}: expected a text of 1 to {LONGEST_STOP:,} characters")
    if stops and not has_tokenizer:
        raise Refused("stop has texts, but the engine has no tokenizer; give stop_tokens, or pass a tokenizer")
    if not isinstance(salt, str):
        raise Refused(f"salt={_short(salt)}: expected a text")
    check_text("salt", salt)


def check_text(what: str, text: str) -> None:
    """Raise Refused unless a text can be written in UTF-8; JSON can hold half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused(f"{what} holds half of a character (a lone surrogate) at place {error.start}") from None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
