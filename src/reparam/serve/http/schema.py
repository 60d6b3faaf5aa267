"""The requests that the server takes: OpenAI's, as far as they are honored.

A field that the server does not honor is refused by its name. Fields that say what holds anyway, such as
`"frequency_penalty": 0`, are taken, because some clients always send them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "parallel_tool_calls": (True,),
    "store": (False,),
    "metadata": ({},),
    "user": (),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
"""Fields of OpenAI and vLLM that are not honored, with the values that change nothing; so does null."""
DEEPEST = 64
"""How many lists and objects of a request can be inside each other."""
CHOICES = 16
MOST_SEED = 2**63 - 1
Name = Annotated[str, Field(min_length=1, max_length=512)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0)]


class Strict(BaseModel):
    """An object without further keys, whose values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """What a stream tells besides its text."""

    include_usage: bool = False
    """Send a last event with the usage and without choices."""


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A message of a chat. The chat template gets all its keys."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @field_validator("content", mode="wrap")
    @classmethod
    def _one_sentence(cls, value: Any, check: Any) -> Any:
        return _told(value, check, "expected a text, a list of parts with text, or null beside tool calls")


class Asked(Strict):
    """What both kinds of requests have."""

    model: Name
    """The name of an adapter, of the base, or a sum such as `a+0.5*b`."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] = -1
    """-1 or 0 for all tokens."""
    n: Annotated[int, Field(ge=1, le=CHOICES)] = 1
    seed: Annotated[int, Field(ge=0, le=MOST_SEED)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, given: Any) -> Any:
        """Leave out what changes nothing."""
        if not isinstance(given, Mapping):
            return given
        _check_values(given)
        known = cls.model_fields
        return {
            key: value
            for key, value in given.items()
            if not (key in NEUTRAL and key not in known and (value is None or value in NEUTRAL[key]))
            and not (value is None and key in known and not known[key].is_required())
        }

    @field_validator("stop", mode="wrap")
    @classmethod
    def _stop_in_one_sentence(cls, value: Any, check: Any) -> Any:
        return _told(value, check, "expected a text of 1 to 256 characters, or a list of up to 16 of them")

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise _problem("stream_options is only for streams; leave it out, or set stream to true")
        return self

    @property
    def stops(self) -> list[str]:
        """The texts that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class ChatRequest(Asked):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    """Given to the chat template. Calls in an answer stay text."""
    tool_choice: Literal["auto", "none"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Further variables of the chat template, such as enable_thinking."""

    @model_validator(mode="after")
    def _agree_on_chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise _problem("top_logprobs needs logprobs to be true")
        if self.tool_choice == "auto" and not self.tools:
            raise _problem("tool_choice is for requests with tools; leave it out, or give tools")
        most = (self.max_tokens, self.max_completion_tokens)
        if None not in most and len(set(most)) > 1:
            raise _problem("max_tokens and max_completion_tokens differ; give one of them")
        return self

    @property
    def most(self) -> tuple[str, int | None]:
        """The field with the most tokens of the answer, and its value; None for as many as there is room for."""
        if self.max_tokens is None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens


class CompletionRequest(Asked):
    """The body of /v1/completions."""

    prompt: (
        str
        | list[TokenId]
        | Annotated[list[str], Field(min_length=1, max_length=128)]
        | Annotated[list[list[TokenId]], Field(min_length=1, max_length=128)]
    )
    """A text, ids of tokens, or a list of such prompts, which are answered in turn."""
    max_tokens: Annotated[int, Field(ge=1)] = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _prompt_in_one_sentence(cls, value: Any, check: Any) -> Any:
        return _told(
            value, check, "expected a text, a list of token ids, or a list of 1 to 128 texts or lists of token ids"
        )

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [one for one in self.prompt if isinstance(one, int)]
        several: list[str | list[int]] = [one for one in self.prompt if not isinstance(one, int)]
        return several or [ids]


class LoadRequest(Strict):
    """The body of /v1/load_lora_adapter, as vLLM's clients send it."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False
    """Give the name to the new adapter if it is in use."""
    is_3d_lora_weight: Literal[False] | None = None
    base_model_name: None = None


class UnloadRequest(Strict):
    """The body of /v1/unload_lora_adapter, as vLLM's clients send it."""

    lora_name: Name
    lora_int_id: int | None = None
    """Not used: an adapter is known by its name."""


def _told(value: Any, check: Any, sentence: str) -> Any:
    """The checked value; one sentence for what would be an error for each kind that it could have."""
    try:
        return check(value)
    except ValueError:
        raise _problem(sentence) from None


def _problem(sentence: str) -> PydanticCustomError:
    return PydanticCustomError("refused", "{sentence}", {"sentence": sentence})


def _check_values(given: Any) -> None:
    """Refuse what later steps could not take: too many levels, and texts that have no UTF-8."""
    level: list[Any] = [given]
    for _ in range(DEEPEST):
        level = [
            inner
            for value in level
            for inner in (
                [*value, *value.values()] if isinstance(value, Mapping) else value if isinstance(value, list) else ()
            )
        ]
        for value in level:
            if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
                raise _problem("holds half of a surrogate pair, which is no text")
        if not level:
            return
    raise _problem(f"has more than {DEEPEST} lists and objects inside each other")
