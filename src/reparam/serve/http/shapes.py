"""The bodies of answers, whole and in events, as OpenAI's clients read them.

`system_fingerprint` is the digest of the adapter that answered; null for the base.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from reparam.serve.request import Token, Usage

Text = Callable[[int], str]
"""The text of a token by its id."""


class Shape:
    """The bodies of the answers to one request."""

    object: str
    part_object: str
    prefix: str

    def __init__(self, id: str, model: str, text_of: Text | None) -> None:
        self.text_of = text_of
        """The text of tokens, if their log probabilities are wanted."""
        self.head = {"id": f"{self.prefix}{id}", "created": int(time.time()), "model": model}
        self.digest: str | None = None

    def whole(self, choices: Sequence[tuple[Sequence[Token], str]], usage: dict[str, Any]) -> dict[str, Any]:
        """The whole answer. Each choice has its tokens, and why it ended."""
        made = [self.choice(number, tokens, end) for number, (tokens, end) in enumerate(choices)]
        return self._body(self.object, made, usage)

    def event(self, choice: dict[str, Any] | None, usage: dict[str, Any] | None) -> dict[str, Any]:
        """An event with a part of a choice; without one, that of the usage."""
        return self._body(self.part_object, [] if choice is None else [choice], usage)

    def begin(self, number: int) -> dict[str, Any] | None:
        """What is sent before a choice's first token."""
        raise NotImplementedError

    def part(self, number: int, token: Token) -> dict[str, Any]:
        """A token of a choice."""
        raise NotImplementedError

    def end(self, number: int, why: str) -> dict[str, Any]:
        """The end of a choice."""
        raise NotImplementedError

    def choice(self, number: int, tokens: Sequence[Token], end: str) -> dict[str, Any]:
        """A whole choice."""
        raise NotImplementedError

    def _body(self, object: str, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        return {**self.head, "object": object, "system_fingerprint": self.digest, "choices": choices, "usage": usage}


class ChatShape(Shape):
    """The bodies of /v1/chat/completions."""

    object, part_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def begin(self, number: int) -> dict[str, Any] | None:
        """The role of the answer."""
        return self._part(number, {"role": "assistant", "content": ""}, None, None)

    def part(self, number: int, token: Token) -> dict[str, Any]:
        """A token of a choice."""
        return self._part(number, {"content": token.text}, self._logprobs([token]), None)

    def end(self, number: int, why: str) -> dict[str, Any]:
        """The end of a choice."""
        return self._part(number, {}, None, why)

    def choice(self, number: int, tokens: Sequence[Token], end: str) -> dict[str, Any]:
        """A whole choice."""
        message = {"role": "assistant", "content": _text(tokens), "refusal": None}
        return {"index": number, "message": message, "logprobs": self._logprobs(tokens), "finish_reason": end}

    def _part(self, number: int, delta: dict[str, Any], logprobs: Any, why: str | None) -> dict[str, Any]:
        return {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": why}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.text_of is None:
            return None
        of = self.text_of
        content = []
        for token in tokens:
            top = [_entry(of(id), logprob) for id, logprob in token.top]
            content.append({**_entry(of(token.id), token.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}


class TextShape(Shape):
    """The bodies of /v1/completions."""

    object, part_object, prefix = "text_completion", "text_completion", "cmpl-"

    def __init__(self, id: str, model: str, text_of: Text | None) -> None:
        super().__init__(id, model, text_of)
        self._offsets: dict[int, int] = {}

    def begin(self, number: int) -> dict[str, Any] | None:
        """Nothing is sent before the first token."""
        return None

    def part(self, number: int, token: Token) -> dict[str, Any]:
        """A token of a choice."""
        return self._part(number, [token], None)

    def end(self, number: int, why: str) -> dict[str, Any]:
        """The end of a choice."""
        return self._part(number, [], why)

    def choice(self, number: int, tokens: Sequence[Token], end: str) -> dict[str, Any]:
        """A whole choice."""
        return self._part(number, tokens, end)

    def _part(self, number: int, tokens: Sequence[Token], why: str | None) -> dict[str, Any]:
        logprobs = self._logprobs(number, tokens) if tokens else None
        return {"index": number, "text": _text(tokens), "logprobs": logprobs, "finish_reason": why}

    def _logprobs(self, number: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.text_of is None:
            return None
        of = self.text_of
        texts, offsets = [of(token.id) for token in tokens], []
        for text in texts:
            offsets.append(self._offsets.get(number, 0))
            self._offsets[number] = offsets[-1] + len(text)
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {**{of(id): logprob for id, logprob in token.top}, of(token.id): token.logprob} for token in tokens
            ],
            "text_offset": offsets,
        }


def usage_of(prompts: Sequence[Usage], answers: Sequence[Usage]) -> dict[str, Any]:
    """The tokens of a request: those of each prompt once, and those of all answers."""
    asked, new = sum(one.prompt for one in prompts), sum(one.new for one in answers)
    return {
        "prompt_tokens": asked,
        "completion_tokens": new,
        "total_tokens": asked + new,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached for one in prompts)},
    }


def _text(tokens: Sequence[Token]) -> str:
    return "".join(token.text for token in tokens)


def _entry(text: str, logprob: float | None) -> dict[str, Any]:
    """A token with its bytes, which are not known of a token that is a part of a character."""
    whole = "\N{REPLACEMENT CHARACTER}" not in text
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}
