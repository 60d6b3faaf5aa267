"""The loop that computes steps: requests join and leave, and a loop that dies is replaced.

transformers' loop ends at any exception, and everything in it fails. A watchdog then makes a new loop on the same
model. Requests of which no token was sent start again in it; the others end with an error.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from torch import nn

from reparam.errors import AnswerFailed, Busy, Unavailable
from reparam.serve import stock
from reparam.serve.banks import Banks
from reparam.serve.counts import Counters
from reparam.serve.limits import Limits
from reparam.serve.sampling import Picker, Sampling
from reparam.serve.tickets import End, Router, Ticket

ATTEMPTS = 3
"""How often a request is computed, if loops die before it has sent a token."""
POLL = 0.05
"""Seconds between two looks at the loop."""
_log = logging.getLogger(__name__)


class Loop:
    """transformers' continuous batching over a model with banks."""

    def __init__(self, model: nn.Module, banks: Banks, limits: Limits) -> None:
        self.model = model
        self.banks = banks
        self.limits = limits
        self.state: Literal["running", "restarting", "closed"] = "closed"
        self.draining = False
        """Whether no further request is taken."""
        self.restarts = 0
        self.counters = Counters()
        self.largest = 0
        """The most tokens that one request can have."""
        self._secret = secrets.token_bytes(16)  # so that nobody can make two prompts whose blocks have one hash
        self._tickets: dict[str, Ticket] = {}
        self._lock = threading.Condition()
        self._manager: Any = None
        self._paused = False
        self._watchdog: threading.Thread | None = None
        self._hook: Any = None

    def __len__(self) -> int:
        """The number of requests that are computed or wait."""
        return sum(ticket.ended is None for ticket in list(self._tickets.values()))

    @property
    def busy(self) -> bool:
        """Whether there are steps to compute, and no pause."""
        return self.state == "running" and bool(self._tickets) and not self._paused

    @property
    def waiting(self) -> int:
        """The number of requests that no step has computed yet."""
        return sum(ticket.ended is None and not ticket.begun for ticket in list(self._tickets.values()))

    def start(self) -> None:
        """Make the first loop. Raises ValueError or ReparamError if transformers cannot batch the model."""
        self._hook = self.model.register_forward_pre_hook(self._before, with_kwargs=True)
        try:
            self._begin()
        except BaseException:
            self._hook.remove()
            raise
        self._watchdog = threading.Thread(target=self._watch, name="reparam-serve-watchdog")
        self._watchdog.start()

    def submit(self, ticket: Ticket, *, wait: bool = False) -> None:
        """Let a request join the next step.

        Raises Busy if too many requests are open, and Unavailable if the engine is closed or about to be; and, unless
        `wait` is True, while the engine starts again after a fault.
        """
        try:
            while not self._submitted(ticket):
                if not wait:
                    raise Unavailable("the engine starts again after a fault; send the request again in a moment")
                time.sleep(POLL)
        except BaseException:
            self._forget(ticket)
            raise

    def cancel(self, ticket: Ticket) -> None:
        """End a request, at once for the one who waits. Its slot is kept until no step computes it."""
        self._end(ticket, "cancelled")
        with self._lock:
            if ticket.id in self._tickets and self._manager is not None:
                self._manager.cancel_request(ticket.id)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """A context in which no step runs."""
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self.state != "restarting")
                manager = self._manager if self.state == "running" else None
            if manager is None:
                yield
                return
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(manager.pause())
                except RuntimeError:  # the loop died meanwhile; the watchdog makes another one
                    self._wait_for_another(manager)
                    continue
                self._paused = True
                stack.callback(setattr, self, "_paused", False)
                yield
                return

    def drain(self, seconds: float | None) -> bool:
        """Take no further request, and wait at most so long for the open ones. Returns whether all have ended."""
        with self._lock:
            self.draining = True
        latest = None if seconds is None else time.monotonic() + seconds
        while len(self) and self.state != "closed":
            if latest is not None and time.monotonic() >= latest:
                return False
            self._wait(POLL)
        return True

    def close(self) -> None:
        """End all requests and the loop."""
        with self._lock:
            if self.state == "closed" and self._watchdog is None:
                return
            self._lock.wait_for(lambda: self.state != "restarting")
            self.state = "closed"
            manager, tickets = self._manager, list(self._tickets.values())
        for ticket in tickets:
            self._end(ticket, Unavailable("the engine was closed before the answer was complete"))
        if manager is not None:
            manager.stop(block=True, hard_stop=True)
        if self._watchdog is not None and self._watchdog is not threading.current_thread():
            self._watchdog.join()
        self._watchdog = self._manager = None
        for ticket in list(self._tickets.values()):
            self._forget(ticket)
        if self._hook is not None:
            self._hook.remove()

    def _begin(self) -> None:
        router = Router(self._delivered)
        manager = stock.make_manager(self.model, self.limits, Sampling(self._picker_of, self._not_numbers), router)
        stock.add_salt(manager, lambda request: self._secret + self._tickets[request].salt_bytes, self._found)
        stock.on_step(manager, self.counters.step)
        stock.on_cancelled(manager, self._cancelled)
        self.largest = stock.largest_request(manager)
        self._manager = manager
        manager.start()
        with self._lock:
            self.state = "running"
            self._lock.notify_all()

    def _submitted(self, ticket: Ticket) -> bool:
        with self._lock:
            if self.state == "closed" or self.draining:
                why = "is closed" if self.state == "closed" else "is about to stop"
                raise Unavailable(f"the engine {why}, so it takes no request")
            if len(self) >= self.limits.open_requests:
                raise Busy(
                    f"the engine has {len(self):,} open requests, the most that Limits.open_requests allows; send the "
                    f"request again later"
                )
            if self.state == "running":
                self._tickets[ticket.id] = ticket
                if self._add(ticket):
                    self.counters.taken(ticket)
                    return True
                del self._tickets[ticket.id]
            return False

    def _add(self, ticket: Ticket) -> bool:
        """Give a request to the loop. False if that is dying."""
        added = self._manager.add_request(
            list(ticket.prompt),
            request_id=ticket.id,
            max_new_tokens=ticket.most,
            eos_token_id=sorted(ticket.stops) or -1,
            streaming=True,
        )
        return added is not None

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Set the slots of the tokens of the step that starts."""
        processor = getattr(self._manager, "batch_processor", None)
        if processor is None or kwargs.get("cache") is not processor.cache:
            raise ValueError(
                f"this {type(module).__name__} is served by an engine, which calls it in a thread of its own; ask the "
                f"engine, or close it first"
            )
        requests = processor.inputs_and_outputs.requests_in_batch
        tickets = [self._tickets[request.state.request_id] for request in requests]
        slots = [ticket.slot for ticket in tickets]
        lengths = [request.query_length for request in requests]
        heads = None
        if kwargs.get("logits_to_keep") is not None:
            owners = [slot for slot, length in zip(slots, lengths, strict=True) for _ in range(length)]
            heads = [owners[token] for token in kwargs["logits_indices"].tolist()]
        self.banks.route(slots, lengths, heads)
        for ticket in tickets:
            ticket.begun = True
        self.counters.batch = len(tickets)

    def _picker_of(self, request: str) -> Picker | None:
        return self._tickets[request].picker

    def _found(self, request: str, cached: int) -> None:
        """Note how many tokens of a prompt were in the cache."""
        ticket = self._tickets[request]
        if not ticket.tokens:  # afterwards, a request is only searched for if it had to leave the cache itself
            ticket.cached = cached

    def _not_numbers(self, request: str) -> None:
        ticket = self._tickets[request]
        self._end(
            ticket, AnswerFailed("the model's scores of the next token are not numbers; the adapter or the base is bad")
        )
        self._manager.cancel_request(request)

    def _delivered(self, request: str, tokens: Sequence[int], last: bool, error: str | None) -> None:
        ticket = self._tickets.get(request)
        if ticket is None:
            return
        if error is not None:
            if self._manager.background_thread_status.can_accept_new_requests() is not None:
                return  # the loop is dying; the watchdog decides
            self._end(ticket, AnswerFailed(f"the request failed: {error}"))
        elif ticket.ended is None:
            self.counters.tokens(ticket, len(tokens) - len(ticket.tokens))
            stopped = ticket.take(tokens, last=last)
            if stopped:
                self._end(ticket, "stop")
                if not last:  # a text has stopped it, of which the loop knows nothing
                    self._manager.cancel_request(request)
        if last:
            self._end(ticket, "length")
            self._forget(ticket)

    def _cancelled(self, wanted: set[str], held: set[str]) -> set[str]:
        """Forget cancelled requests that the loop had. Returns those that are still on their way to it."""
        for request in held & self._tickets.keys():
            self._forget(self._tickets[request])
        return {request for request in wanted - held if request in self._tickets}

    def _end(self, ticket: Ticket, why: End) -> None:
        if ticket.end(why):
            self.counters.ended(ticket)

    def _forget(self, ticket: Ticket) -> None:
        self._tickets.pop(ticket.id, None)
        ticket.leave()

    def _watch(self) -> None:
        """Make another loop whenever one has died. Ends with the engine, or with the main thread of the process."""
        while self.state != "closed":
            self._wait(POLL)
            if not threading.main_thread().is_alive():
                return self.close()
            if self.state == "running" and not self._manager.is_running():
                self._restart()
        return None

    def _wait(self, seconds: float) -> None:
        with self._lock:
            self._lock.wait_for(lambda: self.state == "closed", timeout=seconds)

    def _wait_for_another(self, manager: Any) -> None:
        with self._lock:
            self._lock.wait_for(lambda: self._manager is not manager or self.state == "closed")

    def _restart(self) -> None:
        with self._lock:
            if self.state != "running":
                return
            self.state = "restarting"
            dead, tickets = self._manager, list(self._tickets.values())
        why = str(dead.background_thread_status.fatal_error)
        _log.error("a step failed, and the engine starts again: %s", why)
        self.restarts += 1
        failed = f"the engine failed while it computed this answer ({why}); send the request again"
        for ticket in tickets:
            if ticket.ended is not None or ticket.tokens or ticket.attempts >= ATTEMPTS:
                self._end(ticket, AnswerFailed(failed))
                self._forget(ticket)
        try:
            dead.stop(block=True)
            self._begin()
        except Exception as error:
            _log.exception("the engine could not start again")
            with self._lock:
                self.state = "closed"
                self._lock.notify_all()
            for ticket in list(self._tickets.values()):
                self._end(ticket, Unavailable(f"the engine failed and could not start again: {error}"))
                self._forget(ticket)
            return
        for ticket in [ticket for ticket in tickets if ticket.id in self._tickets]:
            ticket.begin_again()
            if not self._add(ticket):  # the new loop has died, too; the watchdog sees it
                break
