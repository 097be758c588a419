# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Sends requests on to the engine when `Admission` allows it, and sends the loads and probes that `Admission` asks for.

| thread | does |
|---|---|
| the caller's | sends the requests that may go on at once by id |
| sender | sends the requests that carry weights, one after the other |
| keeper | asks Admission for the next step, and refuses requests whose deadline has passed |
| worker | sends one load or probe; the keeper abandons this thread when the engine is silent |

This module does not use Triton. It passes a `Request` on or refuses it, and sends loads and probes by an `Engine`.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

from .abandonable import Silence, Worker
from .admission import Admission, Load, Pause, Probe
from .engine_errors import Meaning, is_unavailable, meaning_of, public
from .errors import AdapterUnavailable, EngineSilent, RequestError, ServerStopping
from .pins import PIN_SECONDS
from .tickets import Ticket

LONGEST_PAUSE_SECONDS = 0.25  # between two checks for requests whose deadline has passed
POLL_SECONDS = 0.001
ERROR_SECONDS = 0.25  # after an error of the engine
STOPPING_SECONDS = 5.0  # after the server, being stopped, has refused a probe
PIN_FAILED_SECONDS = 5.0  # after a pinned adapter could not be loaded

Heard = Callable[[], None]


class Request(Protocol):
    """A client's request, which may have to wait for its adapters."""

    def pass_on(self, *, with_weights: bool) -> None:
        """Send the request on. RequestError when it cannot be sent."""

    def fail(self, error: Exception) -> None:
        """Refuse the request, with `error` as its response."""


class Engine(Protocol):
    """Sends loads and probes to the engine, one at a time."""

    def load(self, task_id: int, heard: Heard, *, is_of_pin: bool = False) -> str | None:
        """Ask for one token with the adapter's weights, and return the engine's error text, or None.

        `heard` is called for each response. RequestError when the weights cannot be read. With `is_of_pin`, no request
        waits for the adapter. EngineSilent if the engine is not loaded then, and ServerStopping as for a probe.
        """

    def left_behind(self) -> None:
        """Note that the thread of the current call was abandoned, and that another thread makes the next one."""

    def probe(self, task_id: int | None, tokens: int, heard: Heard) -> str | None:
        """Ask for `tokens` tokens by id alone (None: of the base model); return the engine's error text, or None."""


@dataclass(slots=True)
class _OwnRequest:
    """The state of a load or probe."""

    sent_at: float
    error: str | None = None
    failure: Exception | None = None
    is_left_behind: bool = False


class Dispatcher:
    """Passes requests on to one engine. Its threads run until `stop`."""

    def __init__(
        self,
        admission: Admission,
        engine: Engine,
        *,
        load_timeout: float,
        on_error: Callable[[str], None],
        on_load: Callable[[int, float], None] = lambda *_: None,
        on_pass: Callable[[Ticket], None] = lambda _: None,
        on_miss: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Start the threads. A load or probe is abandoned after `load_timeout` seconds without a response.

        `on_error` is called with the text of each error of the threads. `on_load` is called with the lora_task_id of
        each adapter that was loaded, and the seconds that the load took. `on_pass` is called with the ticket of each
        request that was passed on. `on_miss` is called with the lora_task_id of an adapter that the engine lacked, and
        was believed to hold.
        """
        self._admission = admission
        self._engine = engine
        self._load_timeout = load_timeout
        self._on_error = on_error
        self._on_load = on_load
        self._on_pass = on_pass
        self._on_miss = on_miss
        self._watch: Callable[[], None] = lambda: None
        self._lock = threading.Condition()
        self._requests: dict[Ticket, Request] = {}  # those that have not been sent
        self._with_weights: SimpleQueue[Ticket | None] = SimpleQueue()
        self._is_stopping = False
        self._told: dict[int, str] = {}  # pinned adapters that could not be loaded, and why
        self._worker = Worker()
        self._threads = [
            threading.Thread(target=self._survive, args=(run,), daemon=True) for run in (self._keep, self._send_weights)
        ]
        for thread in self._threads:
            thread.start()

    # Requests

    def ask(self, ticket: Ticket, request: Request) -> None:
        """Send the request on at once, or later from another thread, when `Admission` releases it.

        AdapterUnavailable when too many requests wait; ServerStopping after `stop`.
        """
        with self._lock:
            if self._is_stopping:
                raise ServerStopping
            goes = self._admission.ask(ticket, time.monotonic())
            self._requests[ticket] = request
            by_id = self._by_id([ticket] if goes else [])
            self._lock.notify_all()
        for one in by_id:
            self._send(one)

    def pin(self, adapters: Mapping[int, int]) -> None:
        """From now on, keep these adapters in the engine: lora_task_id -> pages."""
        with self._lock:
            self._admission.pin(adapters)
            self._lock.notify_all()

    def watch(self, look: Callable[[], None]) -> None:
        """Call `look` again and again from now on, from a thread that sends no requests of clients."""
        self._watch = look

    def expect(self, warm: Mapping[int, int]) -> None:
        """See `EngineCache.expect`."""
        with self._lock:
            self._admission.cache.expect(warm, time.monotonic())

    def leave(self, ticket: Ticket) -> bool:
        """Take a request out of the queue without a response; False when it has left the queue already."""
        with self._lock:
            has_left = self._admission.leave(ticket)
            if has_left:
                del self._requests[ticket]
            return has_left

    def end(self, ticket: Ticket, *, had_it: bool) -> None:
        """Note that a request of the router's has ended. `had_it` tells whether the engine had its adapters."""
        with self._lock:
            self._admission.ended(ticket, time.monotonic(), had_it=had_it)
            self._lock.notify_all()

    def lost(self, ticket: Ticket) -> None:
        """Note that the engine did not have the adapter of a request of the router's, which has ended."""
        with self._lock:
            self._admission.lost(ticket, time.monotonic())
            self._lock.notify_all()

    def leave_behind(self, ticket: Ticket) -> None:
        """Note that the router will not tell the end of a request of its own that was sent."""
        with self._lock:
            self._admission.left_behind(ticket, time.monotonic())

    def states(self) -> dict[int, bool]:
        """See `EngineCache.states`."""
        with self._lock:
            return self._admission.cache.states()

    def in_use(self) -> list[int]:
        """The adapters that requests may use now."""
        with self._lock:
            return self._admission.cache.in_use

    def held(self) -> dict[int, int]:
        """See `EngineCache.held`."""
        with self._lock:
            return self._admission.cache.held()

    def waiting(self) -> Mapping[int, int]:
        """The adapters that requests in the queue wait for, with the number of those requests."""
        with self._lock:
            return self._admission.waiting

    def stop(self) -> None:
        """Refuse the requests that wait, and end the threads. A thread that waits for a silent engine is abandoned."""
        with self._lock:
            self._is_stopping = True
            refused = [*self._requests.items()]
            self._requests.clear()
            self._lock.notify_all()
        for _, request in refused:
            request.fail(ServerStopping())
        self._with_weights.put(None)
        for thread in self._threads:
            thread.join()
        self._worker.end()

    # Sending

    def _by_id(self, tickets: list[Ticket]) -> list[Ticket]:
        """The tickets that go on by id alone. Those that carry weights go to the sender's queue.

        Call it under the lock that was held when the tickets got their numbers. The sender waits with each ticket until
        all smaller numbers have arrived, so its queue must be in the order of the numbers.
        """
        for ticket in tickets:
            if ticket.with_weights:
                self._with_weights.put(ticket)
        return [ticket for ticket in tickets if not ticket.with_weights]

    def _send(self, ticket: Ticket) -> None:
        """Send the request of a ticket, or refuse it if it cannot be sent."""
        with self._lock:
            request = self._requests.pop(ticket, None)
        if request is None:  # `stop` has refused it
            return
        if ticket.is_routers:  # the router may tell its end as soon as it is passed on
            self._note_sent(ticket)
        try:
            request.pass_on(with_weights=ticket.with_weights)
        except Exception as error:  # noqa: BLE001  any error must become the request's response
            with self._lock:
                if ticket.is_routers:
                    self._admission.ended(ticket, time.monotonic(), had_it=False)
                else:
                    self._admission.dropped(ticket, time.monotonic())
            request.fail(error)
            return
        if not ticket.is_routers:
            self._note_sent(ticket)
        if not ticket.only_loads:
            self._on_pass(ticket)

    def _note_sent(self, ticket: Ticket) -> None:
        with self._lock:
            self._admission.sent(ticket, time.monotonic())
            self._lock.notify_all()

    def _send_weights(self) -> None:
        while (ticket := self._with_weights.get()) is not None:
            self._wait_for(ticket.number)
            self._send(ticket)

    def _refuse(self, ticket: Ticket, why: Exception) -> None:
        """Refuse the request of a ticket, unless `stop` has refused it."""
        with self._lock:
            request = self._requests.pop(ticket, None)
        if request is not None:
            request.fail(why)

    def _wait_for(self, number: int) -> None:
        """Wait until all requests and loads with a smaller number have reached the engine."""
        with self._lock:
            while not self._is_stopping and not self._admission.is_due(number, time.monotonic()):
                self._lock.wait(POLL_SECONDS)

    # Loads and probes

    def _keep(self) -> None:
        while True:
            self._refuse_late()
            self._watch()
            with self._lock:
                if self._is_stopping:
                    return
                step = self._admission.step(time.monotonic())
                by_id = self._by_id(self._admission.released())
                if isinstance(step, Pause) and not by_id:
                    self._lock.wait(min(step.seconds, LONGEST_PAUSE_SECONDS))
            for ticket in by_id:
                self._send(ticket)
            if isinstance(step, Load):
                self._load(step)
            elif isinstance(step, Probe):
                self._probe(step)

    def _refuse_late(self) -> None:
        with self._lock:
            late = self._admission.expired(time.monotonic())
        for ticket in late:
            why = f"it does not fit beside the adapters in use; waited {ticket.patience:g} s; ask again"
            self._refuse(ticket, AdapterUnavailable(why))

    def _load(self, load: Load) -> None:
        self._wait_for(load.number)
        own = self._do(
            lambda heard: self._engine.load(load.task_id, heard, is_of_pin=load.is_of_pin),
            lambda now: self._admission.let_go(load, now),
        )
        meaning, now = meaning_of(own.error), time.monotonic()
        if own.is_left_behind:
            why = EngineSilent(f"the engine has not responded for {self._load_timeout:g} s")
            self._fail(load, why, None, pin_at=now + PIN_FAILED_SECONDS)
        elif isinstance(own.failure, ServerStopping | EngineSilent):  # the engine is not loaded
            self._fail(load, own.failure, now, pin_at=now + PIN_SECONDS)
        elif own.failure is not None or meaning in (Meaning.ERROR, Meaning.MISS):
            failure = own.failure or _engine_error(own.error or "")
            self._fail(load, failure, now, pin_at=now + PIN_FAILED_SECONDS)
            if load.is_of_pin:
                self._tell(load.task_id, str(failure))
        elif meaning is Meaning.FULL:
            with self._lock:
                never_fits = self._admission.never_fits(load)
                if never_fits is None:
                    self._admission.full(load, now)
            if never_fits is not None:
                self._fail(load, never_fits, now, pin_at=now + PIN_FAILED_SECONDS)
        else:
            with self._lock:
                self._admission.loaded(load, own.sent_at, now)
            self._told.pop(load.task_id, None)
            self._on_load(load.task_id, now - own.sent_at)

    def _fail(self, load: Load, why: Exception, ended_at: float | None, *, pin_at: float) -> None:
        """Refuse the requests that wait for a load that has failed. See `Admission.failed`."""
        with self._lock:
            tickets = self._admission.failed(load, ended_at, pin_at=pin_at)
        for ticket in tickets:
            self._refuse(ticket, why)

    def _tell(self, task_id: int, why: str) -> None:
        """Report that a pinned adapter cannot be loaded, unless the last report said the same."""
        if self._told.get(task_id) != why:
            self._told[task_id] = why
            self._on_error(f"the pinned adapter with lora_task_id {task_id} cannot be loaded: {why}")

    def _probe(self, probe: Probe) -> None:
        own = self._do(lambda heard: self._engine.probe(probe.task_id, probe.tokens, heard), lambda _: None)
        meaning, now = meaning_of(own.error), time.monotonic()
        is_unexpected = False
        with self._lock:
            if own.is_left_behind or own.failure is not None or meaning in (Meaning.ERROR, Meaning.FULL):
                pause = STOPPING_SECONDS if isinstance(own.failure, ServerStopping) else ERROR_SECONDS
                self._admission.not_probed(probe, now, pause)
            elif meaning is Meaning.MISS:
                is_unexpected = self._admission.missed(probe, now)
            else:
                self._admission.probed(probe, own.sent_at, now)
        if is_unexpected and probe.task_id is not None:
            self._on_miss(probe.task_id)

    def _do(self, ask: Callable[[Heard], str | None], ended_late: Callable[[float], None]) -> _OwnRequest:
        """Have the worker send a load or probe, and abandon the worker's thread when the engine is silent.

        `ended_late` is called with the time at which an abandoned request has ended after all.
        """
        own = _OwnRequest(time.monotonic())
        silence = Silence(self._load_timeout, self._load_timeout)

        def heard() -> None:
            silence.heard()
            with self._lock:
                if not own.is_left_behind:
                    self._admission.responded(own.sent_at, time.monotonic())

        def do() -> None:
            own.sent_at = time.monotonic()
            silence.asked()
            try:
                if self._is_stopping:  # the server may unload the model at any time
                    raise ServerStopping
                own.error = ask(heard)
            except Exception as error:  # noqa: BLE001  any error is the response to the requests that wait for it
                own.failure = error
                if not isinstance(error, RequestError):
                    self._on_error(traceback.format_exc())
            silence.ended()
            with self._lock:
                if own.is_left_behind:
                    ended_late(time.monotonic())

        def is_stuck() -> bool:
            self._refuse_late()
            with self._lock:
                own.is_left_behind = self._is_stopping or silence.is_too_long()
            return own.is_left_behind

        self._worker.do(do, is_stuck)
        if own.is_left_behind and not self._is_stopping:
            self._engine.left_behind()
            self._on_error(f"the engine has not responded to a request of tritonlora for {self._load_timeout:g} s")
        return own

    def _survive(self, run: Callable[[], None]) -> None:
        """Run `run` until `stop`. An unexpected error is reported, and `run` starts again."""
        while not self._is_stopping:
            try:
                run()
            except Exception:  # noqa: BLE001
                self._on_error(traceback.format_exc())


def _engine_error(text: str) -> RequestError:
    kind = AdapterUnavailable if is_unavailable(text) else RequestError
    return kind(f"the engine has not loaded it: {public(text)}")
