"""A request in the engine: what it asks for, what it has got, and who waits for it."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Literal

from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from reparam.errors import ReparamError
from reparam.serve.request import Answer, Token, Usage
from reparam.serve.sampling import Choice, Picker
from reparam.serve.text import Writer

End = Literal["stop", "length", "cancelled"] | ReparamError
"""Why an answer ended: a token or text that stops it, the number of tokens, its caller; or an error."""
_numbers = itertools.count()


@dataclasses.dataclass(eq=False)
class Ticket:
    """One request. `on_token` and `on_end` are called from the engine's thread, and must not block.

    A ticket ends once, whatever happens, so that nobody waits in vain.
    """

    prompt: tuple[int, ...]
    most: int
    """The most tokens of the answer."""
    stops: frozenset[int]
    """Tokens that end the answer."""
    choice: Choice
    writer: Callable[[], Writer]
    """Makes what gives the tokens their text."""
    name: str | None
    """The name of the adapter; None for the base."""
    slot: int
    """The adapter's slot in the banks; -1 for the base."""
    digest: str | None
    """The digest of the adapter; None for the base."""
    salt: str
    release: Callable[[], None]
    """Gives the slot back. Called when no further step computes this request."""
    on_token: Callable[[Token], None] = lambda token: None
    on_end: Callable[[End], None] = lambda end: None
    id: str = dataclasses.field(default_factory=lambda: f"r{next(_numbers)}")
    tokens: list[Token] = dataclasses.field(default_factory=list)
    cached: int = 0
    """Tokens of the prompt that were in the cache."""
    attempts: int = 1
    begun: bool = False
    """Whether a step has computed some of it."""
    ended: End | None = None
    released: bool = False
    picker: Picker | None = None
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.picker, self._writer = self.choice.picker(), self.writer()

    @property
    def usage(self) -> Usage:
        """The tokens so far."""
        return Usage(len(self.prompt), self.cached, len(self.tokens))

    @property
    def salt_bytes(self) -> bytes:
        """What separates the keys and values of this request from those of other adapters and salts."""
        return f"{self.digest or ''}/{self.salt}".encode()

    def begin_again(self) -> None:
        """Prepare another attempt of a request that has sent nothing."""
        self.attempts, self.begun, self.cached = self.attempts + 1, False, 0
        self.picker, self._writer = self.choice.picker(), self.writer()

    def take(self, ids: Sequence[int], *, last: bool) -> bool:
        """Send the tokens that are new, given all tokens so far. Returns whether one of them stops the answer."""
        for place in range(len(self.tokens), len(ids)):
            text = self._writer.add(ids[place], last=last and place == len(ids) - 1)
            token = Token(ids[place], text)
            if self.picker is not None and self.picker.scored:
                scored = self.picker.scored[place]
                token = Token(ids[place], text, scored.logprob, scored.top)
            self.tokens.append(token)
            self.on_token(token)
        return self._writer.stopped

    def end(self, why: End) -> bool:
        """End the answer, unless it has ended. Returns whether this call has ended it."""
        with self._lock:
            if self.ended is not None:
                return False
            self.ended = why
        self.on_end(why)
        return True

    def answer(self) -> Answer:
        """The whole answer, when it has ended with "stop" or "length"."""
        assert self.ended == "stop" or self.ended == "length"
        text = "".join(token.text for token in self.tokens)
        return Answer(self.tokens, text, self.ended, self.digest, self.usage)

    def leave(self) -> None:
        """Give the slot back, once."""
        if not self.released:
            self.released = True
            self.release()


class Router(OutputRouter):
    """Brings what the loop delivers to the tickets, in the loop's thread."""

    def __init__(self, deliver: Callable[[str, Sequence[int], bool, str | None], None]) -> None:
        super().__init__()
        self._deliver = deliver

    def deliver(self, output: GenerationOutput) -> None:
        """Bring one output to its ticket: id, all tokens so far, whether it is the last one, and the error if any."""
        failed = (output.error or "failed") if output.status == RequestStatus.FAILED else None
        self._deliver(output.request_id, output.generated_tokens, output.is_finished(), failed)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        """Bring the outputs of a step to their tickets."""
        for output in outputs:
            self.deliver(output)
