"""Prompts as ids of tokens: chats by the chat template that the adapter was trained with, texts as they are.

Templates and texts are read in a thread of its own, so that a long one does not hold up the other requests.
"""

from __future__ import annotations

import asyncio
import copy
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from reparam.data.chat import ChatTemplate
from reparam.data.framing import Frame, frame
from reparam.data.messages import checked_messages
from reparam.errors import DataError
from reparam.hf.stops import stop_tokens
from reparam.io.prompt_format import PromptFormat
from reparam.serve.engine import Engine
from reparam.serve.http.errors import Problem
from reparam.serve.http.schema import ChatRequest

RESERVED = {"messages", "tools", "documents", "add_generation_prompt"}
"""Variables of chat templates that a request sets in other ways, or not at all."""
Found = TypeVar("Found")


class Prompts:
    """Makes prompts for an engine, which has a tokenizer."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        assert engine.tokenizer is not None
        self._tokenizer: PreTrainedTokenizerBase = engine.tokenizer
        self._worker = ThreadPoolExecutor(1, "reparam-serve-prompts")
        self._style = functools.lru_cache(maxsize=64)(self._style_of)

    async def text(self, text: str) -> list[int]:
        """The ids of a text to continue."""
        return await self._run(lambda: list(self._tokenizer(text)["input_ids"]))

    async def chat(self, request: ChatRequest, trained: PromptFormat | None) -> tuple[list[int], list[int]]:
        """The ids of a chat up to where its answer begins, and those of the tokens that end the answer.

        Raises Problem 400 for a chat that the template refuses, or of which it would leave something out.
        """
        return await self._run(functools.partial(self._chat, request, trained))

    def close(self) -> None:
        """End the thread."""
        self._worker.shutdown(cancel_futures=True)

    async def _run(self, work: Callable[[], Found]) -> Found:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)

    def _chat(self, request: ChatRequest, trained: PromptFormat | None) -> tuple[list[int], list[int]]:
        template = (trained and trained.chat_template) or self._tokenizer.chat_template
        if not template:
            raise Problem(400, "this model has no chat template; use /v1/completions", code="no_chat_template")
        variables = dict(request.chat_template_kwargs or {})
        if taken := sorted(RESERVED & variables.keys()):
            raise Problem(
                400, f"chat_template_kwargs: {taken[0]} cannot be set here; leave it out", param="chat_template_kwargs"
            )
        tools = request.tools if request.tools and request.tool_choice != "none" else None
        try:
            style = self._style(str(template), trained and trained.system, trained and trained.thinking)
            given = [message.model_dump(exclude_unset=True, exclude_none=True) for message in request.messages]
            messages = style.frame.messages(checked_messages(given, "messages"))
            if not style.takes_system and any(m["role"] in ("system", "developer") for m in messages):
                raise Problem(
                    400,
                    "messages: the chat template of this model ignores or refuses system messages",
                    param="messages",
                )
            variables = {**style.frame.variables, **variables}
            text = style.template.prompt(messages, {**variables, "tools": tools})
            if tools and text == style.template.prompt(messages, variables):
                raise Problem(400, "tools: the chat template of this model ignores them", param="tools")
        except DataError as error:
            raise Problem(400, "; ".join(error.problems), param="messages") from None
        except (ValueError, RecursionError) as error:
            raise Problem(400, f"messages: {error}", param="messages") from None
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"]), style.stops

    def _style_of(self, template: str, system: str | None, thinking: bool | None) -> _Style:
        tokenizer = copy.copy(self._tokenizer)
        tokenizer.chat_template = template
        made = ChatTemplate(tokenizer)
        return _Style(
            made,
            frame(tokenizer, system=system, thinking=thinking, key="the adapter's "),
            stop_tokens(self._engine.model, tokenizer),
            made.takes_system(),
        )


class _Style:
    """How chats become texts."""

    def __init__(self, template: ChatTemplate, frame: Frame, stops: Sequence[int], takes_system: bool) -> None:
        self.template = template
        self.frame = frame
        self.stops = list(stops)
        self.takes_system = takes_system
