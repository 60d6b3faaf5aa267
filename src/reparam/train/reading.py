"""The tokenizer of a run with its chat template, and what the run adds to its chats."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from reparam.data.framing import Frame, frame
from reparam.data.row import Row
from reparam.data.templates import chosen
from reparam.errors import ConfigError, DataError
from reparam.hf.models import load_tokenizer
from reparam.io.prompt_format import PromptFormat
from reparam.train.config import Config
from reparam.train.sections import DataConfig


def tokenizer_of(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer of the base, with the chat template that `data.chat_template` chooses.

    Raises BaseError if there is no tokenizer, and ConfigError if the template cannot be used.
    """
    tokenizer = load_tokenizer(config.base.path, revision=config.base.revision)
    if config.data.chat_template is not None:
        try:
            tokenizer.chat_template = chosen(config.data.chat_template, tokenizer)
        except DataError as error:
            raise ConfigError(f"data.chat_template: {error}") from None
    return tokenizer


def frame_of(data: DataConfig, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> Frame:
    """What `data.system` and `data.thinking` add to the chats.

    Raises ConfigError if they, or `data.chat_template`, are set and there are no chats, or if the template does not
    depend on them.
    """
    given = {"chat_template": data.chat_template, "system": data.system, "thinking": data.thinking}
    given = {key: value for key, value in given.items() if value is not None}
    if given and not any(row.kind == "chat" for row in rows):
        keys = ", ".join(f"data.{key}" for key in given)
        raise ConfigError(f"{keys}: only chats depend on it, and {data.train} has none; leave it out")
    try:
        return frame(tokenizer, system=data.system, thinking=data.thinking)
    except DataError as error:
        raise ConfigError(str(error)) from None


def prompt_format(data: DataConfig, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> PromptFormat:
    """How an adapter that is trained on these rows is prompted."""
    kinds = {row.kind for row in rows}
    template = tokenizer.get_chat_template() if data.chat_template is not None else None
    return PromptFormat(kinds.pop() if len(kinds) == 1 else "mixed", template, data.system, data.thinking)
