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
from reparam.serve.sampling import Choice, Draws

End = Literal["stop", "length", "cancelled"] | ReparamError
"""Why an answer ended: an end token, the number of tokens, its caller; or an error."""
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
    choice: Choice
    slot: int
    """The adapter's slot in the banks; -1 for the base."""
    digest: str | None
    """The digest of the adapter; None for the base."""
    release: Callable[[], None]
    """Gives the slot back. Called when no further step computes this request."""
    on_token: Callable[[int], None] = lambda token: None
    on_end: Callable[[End], None] = lambda end: None
    id: str = dataclasses.field(default_factory=lambda: f"r{next(_numbers)}")
    tokens: list[int] = dataclasses.field(default_factory=list)
    attempts: int = 1
    ended: bool = False
    released: bool = False
    draws: Draws | None = None
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.draws = self.choice.draws()

    def begin_again(self) -> None:
        """Prepare another attempt of a request that has sent nothing."""
        self.attempts += 1
        self.draws = self.choice.draws()

    def take(self, tokens: Sequence[int]) -> None:
        """Send the tokens that are new, given all tokens so far."""
        for token in tokens[len(self.tokens) :]:
            self.tokens.append(token)
            self.on_token(token)

    def end(self, why: End) -> None:
        """End the answer, unless it has ended."""
        with self._lock:
            if self.ended:
                return
            self.ended = True
        self.on_end(why)

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
