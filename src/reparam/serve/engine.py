"""The engine: many requests over one base, each with an adapter of its own, in one batch.

    with Engine(model, tokenizer, adapters="adapters") as engine:
        answers = engine.answer([Request("def area(", adapter="signatures"), Request("def area(")])

From asyncio: `async for token in engine.generate("def area(", adapter="signatures")`.
"""

from __future__ import annotations

import asyncio
import functools
import queue
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedTokenizerBase

from reparam.errors import Refused, ReparamError, Unavailable
from reparam.hf.stops import stop_tokens
from reparam.serve import stock
from reparam.serve.admission import Bounds, check_choice, check_prompt, check_stops, check_text, check_texts
from reparam.serve.banks import Banks
from reparam.serve.counts import Metrics
from reparam.serve.limits import Limits
from reparam.serve.loop import Loop
from reparam.serve.proof import Prover
from reparam.serve.request import Answer, Request, Token
from reparam.serve.shelf import Shelf
from reparam.serve.store import Resident, Store
from reparam.serve.stream import Stream
from reparam.serve.text import Writer
from reparam.serve.tickets import End, Ticket


class Engine:
    """Answers requests over one base model and the adapters in a folder.

    `model` is a transformers model without adapters on it, dense or quantized by reparam. While the engine is open,
    nobody else can call the model. `adapters` is a folder with one folder for each adapter, whose name requests give.

    Raises FormatError if `adapters` holds none, ValueError if the model has adapters on it or transformers cannot batch
    it, and ReparamError if this release of transformers lacks what the engine needs. An adapter is read when it is
    first used, so a damaged one raises FormatError there.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        adapters: str | Path | None = None,
        limits: Limits | None = None,
    ) -> None:
        if getattr(model, "reparam_state", None) is not None:
            raise ValueError(
                f"this {type(model).__name__} has adapters on it; remove them, and pass their folder as adapters="
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.limits = limits or Limits()
        self._banks = Banks(model)
        self._loop = Loop(model, self._banks, self.limits)
        shelf = Shelf(self.limits.host_bytes_for(next(model.parameters()).device))
        self._store = Store(
            self._banks,
            Prover(model),
            shelf,
            self.limits.adapter_bytes,
            quiet=self._loop.quiet,
            busy=lambda: self._loop.busy,
        )
        if adapters is not None:
            self._store.register(Path(adapters))
        self._loop.start()
        self._stops = frozenset(_stops_of(model, tokenizer))
        config: Any = model.config
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        self._bounds = Bounds(stock.vocabulary_of(model), context, self._loop.largest)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def adapters(self) -> list[str]:
        """The names that requests can give."""
        return self._store.names()

    @property
    def state(self) -> Literal["running", "restarting", "draining", "closed"]:
        """Whether requests are taken, or the engine starts again after a fault, or takes none, or is closed."""
        state = self._loop.state
        return "draining" if self._loop.draining and state != "closed" else state

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.state == "running"

    @property
    def longest(self) -> int:
        """The most tokens that the prompt and the answer of one request can have together."""
        return self._bounds.longest

    def digests(self) -> Mapping[str, str]:
        """The digests of the adapters that have been used, by name."""
        return self._store.digests()

    def folder_of(self, name: str) -> Path:
        """The folder of an adapter. Raises UnknownAdapter if no adapter has this name."""
        return self._store.folder(name)

    async def look(self, name: str) -> Resident:
        """What the engine knows of an adapter, which is read if that is needed: its digest, method and prompt format.

        Raises UnknownAdapter if no adapter has this name, and FormatError if it cannot be served.
        """
        held = await self._leased(name)
        assert held is not None
        self._give_back(held)
        return held

    def metrics(self) -> Metrics:
        """What the engine has counted so far."""
        loop, store = self._loop, self._store
        return loop.counters.metrics(
            ready=self.ready,
            open_requests=len(loop),
            waiting=loop.waiting,
            restarts=loop.restarts,
            store=(len(store), store.nbytes(), store.loads),
        )

    def load(self, name: str, folder: str | Path) -> str:
        """Read an adapter and let requests use it by this name. Returns its digest.

        A name that is in use means the new adapter for later requests; those that have begun end with the old one.
        Raises FormatError, without a change, if the adapter cannot be served, and ValueError for an invalid name.
        """
        return self._store.load(name, Path(folder)).result()

    def unload(self, name: str) -> None:
        """Forget an adapter. Requests that have begun end with it. Raises UnknownAdapter if no adapter has the name."""
        self._store.unload(name)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer requests together, of any number; blocks until all are answered.

        Raises Refused, before anything is computed, if one of them cannot be answered (UnknownAdapter for its adapter),
        FormatError if an adapter cannot be served, Unavailable if the engine is full or closed, and AnswerFailed if it
        fails at one of them.
        """
        prompts = [self._checked(request) for request in requests]
        ends: queue.SimpleQueue[tuple[int, End]] = queue.SimpleQueue()
        answers: dict[int, Answer] = {}
        most = min(self.limits.open_requests, 2 * self.limits.requests)  # of this call that are open at once
        tickets: dict[int, Ticket] = {}
        try:
            for number in sorted(range(len(requests)), key=lambda number: not self._is_ready(requests[number])):
                while len(tickets) - len(answers) >= most:
                    self._take(ends, tickets, answers)
                held = self._acquire(requests[number].adapter)
                lease = held.result() if isinstance(held, Future) else held
                ticket = self._ticket(requests[number], prompts[number], lease)
                ticket.on_end = functools.partial(_put, ends, number)
                self._loop.submit(ticket, wait=True)
                tickets[number] = ticket
            while len(answers) < len(tickets):
                self._take(ends, tickets, answers)
        except BaseException:
            for ticket in tickets.values():
                self._loop.cancel(ticket)
            raise
        return [answers[number] for number in range(len(requests))]

    async def generate(self, prompt: str | Sequence[int], **settings: Any) -> AsyncIterator[Token]:
        """The tokens of one answer, as they are computed. Leaving the loop, or cancelling the task, ends the request.

        `settings` are further fields of `Request`. Raises what `answer` raises.
        """
        stream = await self.open(Request(prompt, **settings))
        try:
            async for token in stream:
                yield token
        finally:
            stream.cancel()

    async def open(self, request: Request) -> Stream:
        """Begin an answer: its tokens come from the stream that this returns. Call `Stream.cancel` to end it early.

        Raises, before anything is computed, what `answer` raises for a request that cannot be answered.
        """
        ids = self._checked(request)
        held = await self._leased(request.adapter)
        ticket = self._ticket(request, ids, held)
        stream = Stream(ticket, functools.partial(self._loop.cancel, ticket))
        self._loop.submit(ticket)
        return stream

    def drain(self, seconds: float | None = None) -> bool:
        """Take no further request, and wait until all open ones have ended, at most so many seconds.

        Returns whether all have ended. Close the engine afterwards.
        """
        return self._loop.drain(seconds)

    def close(self) -> None:
        """End all requests, and give the model back as it was."""
        self._loop.close()
        self._store.close()
        self._banks.leave()

    def _checked(self, request: Request) -> list[int]:
        """The ids of the prompt. Raises Refused unless the request can be computed."""
        if self.state == "closed":
            raise Unavailable("the engine is closed")
        if request.adapter is not None:
            self._store.check(request.adapter)
        check_choice(request.choice)
        check_stops(request.stop_tokens)
        check_texts(request.stop, request.salt, self.tokenizer is not None)
        ids = self._ids(request.prompt)
        check_prompt(ids, request.max_new_tokens, self._bounds)
        return ids

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise Refused("the prompt is a text, but the engine has no tokenizer; give ids, or pass a tokenizer")
        check_text("the prompt", prompt)
        return list(self.tokenizer(prompt)["input_ids"])

    def _acquire(self, name: str | None) -> Resident | Future[Resident] | None:
        return None if name is None else self._store.acquire(name)

    async def _leased(self, name: str | None) -> Resident | None:
        held = self._acquire(name)
        if not isinstance(held, Future):
            return held
        try:
            return await asyncio.shield(asyncio.wrap_future(held))
        except asyncio.CancelledError:
            self._give_back(held)
            raise

    def _give_back(self, held: Resident | Future[Resident] | None) -> None:
        """Release a lease that no ticket holds, also one that is still to come."""
        if isinstance(held, Future):
            held.add_done_callback(self._give_back_done)
        elif held is not None:
            self._store.release(held)

    def _give_back_done(self, done: Future[Resident]) -> None:
        if not done.cancelled() and done.exception() is None:
            self._store.release(done.result())

    def _is_ready(self, request: Request) -> bool:
        return request.adapter is None or self._store.is_ready(request.adapter)

    def _ticket(self, request: Request, ids: list[int], lease: Resident | None) -> Ticket:
        stops = self._stops if request.stop_tokens is None else frozenset(request.stop_tokens)
        return Ticket(
            prompt=tuple(ids),
            most=request.max_new_tokens,
            stops=stops,
            choice=request.choice,
            writer=functools.partial(Writer, self.tokenizer, stops, tuple(request.stop)),
            name=request.adapter,
            slot=-1 if lease is None else lease.slot,
            digest=None if lease is None else lease.digest,
            salt=request.salt,
            release=functools.partial(self._give_back, lease),
        )

    def _take(
        self, ends: queue.SimpleQueue[tuple[int, End]], tickets: dict[int, Ticket], answers: dict[int, Answer]
    ) -> None:
        """Wait for the next answer that ends. Raises its error, if it has one."""
        number, end = ends.get()
        if isinstance(end, ReparamError):
            raise end
        answers[number] = tickets[number].answer()


def _put(ends: queue.SimpleQueue[tuple[int, End]], number: int, end: End) -> None:
    ends.put((number, end))


def _stops_of(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    if tokenizer is not None:
        return stop_tokens(model, tokenizer)
    told = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [] if told is None else [told] if isinstance(told, int) else list(told)
