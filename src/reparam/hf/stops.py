"""The tokens at which a generated answer ends.

The end token of the tokenizer is not enough: many models end a turn with another token, such as `<end_of_turn>`,
`<|end|>` or `<|im_end|>`, and go on for ever if generation does not stop there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from reparam.data.chat import ChatTemplate


def stop_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of all tokens that end an answer, ascending.

    They are the end tokens of the model's generation config and of its tokenizer, and the token with which the chat
    template ends an answer. A template that refuses a chat of one question and one answer adds none.
    """
    told = getattr(model, "generation_config", None)
    found = {*_ids(getattr(told, "eos_token_id", None)), *_ids(tokenizer.eos_token_id)}
    if tokenizer.chat_template:
        try:
            end = ChatTemplate(tokenizer).end_of_answer()
        except ValueError:
            end = ""
        found |= set(_ids(tokenizer.convert_tokens_to_ids(end) if end else None))
    return sorted(found)


def until_stop(ids: Sequence[int], stops: Iterable[int]) -> list[int]:
    """The ids before the first stop token.

    >>> until_stop([4, 7, 2, 2], [2])
    [4, 7]
    """
    ends = set(stops)
    end = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[:end])


def _ids(value: Any) -> list[int]:
    """The ids in an `eos_token_id`: an integer, a list of integers, or None."""
    if value is None:
        return []
    return [int(one) for one in value] if isinstance(value, list | tuple) else [int(value)]
