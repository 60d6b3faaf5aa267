"""The tokenizer of a run with its chat template, and what the run adds to its chats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from reparam.data.framing import Frame, frame
from reparam.data.templates import chosen
from reparam.errors import ConfigError, DataError
from reparam.hf.processors import words_of
from reparam.io.prompt_format import PromptFormat
from reparam.train.config import Config
from reparam.train.sections import DataConfig


def tokenizer_of(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer of the base, with the chat template that `data.chat_template` chooses.

    Raises BaseError if there is no tokenizer, and ConfigError if the template cannot be used.
    """
    tokenizer = words_of(config.base.path, revision=config.base.revision)
    if config.data.chat_template is not None:
        try:
            tokenizer.chat_template = chosen(config.data.chat_template, tokenizer)
        except DataError as error:
            raise ConfigError(f"data.chat_template: {error}") from None
    return tokenizer


def frame_of(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Frame:
    """What `data.system` and `data.thinking` add to the chats.

    Raises ConfigError if the template does not depend on them.
    """
    try:
        return frame(tokenizer, system=data.system, thinking=data.thinking)
    except DataError as error:
        raise ConfigError(str(error)) from None


def check_chats(data: DataConfig, kinds: Mapping[str, int]) -> None:
    """Raise ConfigError if a setting of chats is set and there are none. `kinds` has the number of rows by kind."""
    given = {"chat_template": data.chat_template, "system": data.system, "thinking": data.thinking}
    keys = [f"data.{key}" for key, value in given.items() if value is not None]
    if keys and not kinds.get("chat"):
        raise ConfigError(
            f"{', '.join(keys)}: only chats depend on it, and {', '.join(data.sources())} has none; leave it out"
        )


def prompt_format(data: DataConfig, tokenizer: PreTrainedTokenizerBase, kinds: Mapping[str, int]) -> PromptFormat:
    """How an adapter that is trained on rows of these kinds is prompted."""
    rows: Any = next(iter(kinds)) if len(kinds) == 1 else "mixed"
    template = tokenizer.get_chat_template() if data.chat_template is not None else None
    return PromptFormat(rows, template, data.system, data.thinking)
