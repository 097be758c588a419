# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The dispatcher's threads, before an engine that does as it is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import pytest

from tritonlora.serving.admission import Admission
from tritonlora.serving.dispatcher import Dispatcher
from tritonlora.serving.engine_cache import EngineCache
from tritonlora.serving.errors import AdapterUnavailable, EngineSilent, RequestError, ServerStopping
from tritonlora.serving.tickets import Ticket

FULL = "Assertion failed: There are no done tasks to evict"
WAIT_SECONDS = 30


class Answers:
    """What becomes of one request: its answer is put here once."""

    def __init__(self, failure: Exception | None = None, meanwhile: Callable[[], None] = lambda: None) -> None:
        self._failure = failure
        self._meanwhile = meanwhile  # happens while it is passed on
        self._queue = SimpleQueue[str | Exception]()

    def pass_on(self, *, with_weights: bool) -> None:
        if with_weights and self._failure:
            raise self._failure
        self._meanwhile()
        self._queue.put("with weights" if with_weights else "by id")

    def fail(self, error: Exception) -> None:
        self._queue.put(error)

    def get(self) -> str | Exception:
        return self._queue.get(timeout=WAIT_SECONDS)

    @property
    def is_empty(self) -> bool:
        return self._queue.empty()


class Engine:
    """Loads say what `on_load` does: an error, or None. Probes are answered."""

    def __init__(self) -> None:
        self.loads: list[int] = []
        self.pins: list[int] = []  # those of the loads for which no request waited
        self.tokens_of_a_load = 1
        self.probes = 0
        self.was_left_behind = threading.Event()
        self.on_load: Callable[[int], str | None] = lambda _: None
        self.on_probe: Callable[[], str | None] = lambda: None

    def load(self, task_id: int, heard: Callable[[], None], *, is_of_pin: bool = False) -> str | None:
        self.loads.append(task_id)
        self.pins += [task_id] if is_of_pin else []
        error = self.on_load(task_id)
        for _ in range(self.tokens_of_a_load if error is None else 0):
            heard()
        return error

    def probe(self, task_id: int | None, tokens: int, heard: Callable[[], None]) -> str | None:  # noqa: ARG002
        self.probes += 1
        error = self.on_probe()
        for _ in range(tokens if error is None else 0):
            heard()
        time.sleep(0.001)
        return error

    def left_behind(self) -> None:
        self.was_left_behind.set()


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def start(engine: Engine) -> Iterator[Callable[..., Dispatcher]]:
    """Start a dispatcher in front of `engine`, whose cache has so many pages."""
    started: list[Dispatcher] = []

    def begin(
        pages: int = 4,
        *,
        warm: tuple[int, ...] = (),
        load_timeout: float = WAIT_SECONDS,
        on_miss: Callable[[int], None] = lambda _: None,
        on_pass: Callable[[Ticket], None] = lambda _: None,
        on_error: Callable[[str], None] = lambda _: None,
        on_load: Callable[[int, float], None] = lambda *_: None,
    ) -> Dispatcher:
        now = time.monotonic()
        admission = Admission(EngineCache(pages, dict.fromkeys(warm, 1), now), now)
        started.append(
            Dispatcher(
                admission,
                engine,
                load_timeout=load_timeout,
                on_error=on_error,
                on_load=on_load,
                on_miss=on_miss,
                on_pass=on_pass,
            )
        )
        return started[-1]

    yield begin
    for dispatcher in started:
        dispatcher.stop()


def wait_for(event: threading.Event) -> None:
    """What an engine does that says nothing until then."""
    event.wait(WAIT_SECONDS)


def ticket(task_id: int, *, patience: float = WAIT_SECONDS, takes_weights: bool = True, pages: int = 1) -> Ticket:
    """Of a request of four tokens."""
    return Ticket({task_id: pages}, 4, time.monotonic(), patience, takes_weights=takes_weights)


def test_a_held_adapter_goes_by_id_and_another_takes_its_weights_along(start: Callable[..., Dispatcher]) -> None:
    dispatcher, held, new = start(warm=(1,)), Answers(), Answers()
    dispatcher.ask(ticket(1), held)
    dispatcher.ask(ticket(2), new)

    assert ["by id", "with weights"] == [held.get(), new.get()]


def test_how_a_request_found_the_cache_is_told_once_it_has_gone_on(
    start: Callable[..., Dispatcher], engine: Engine
) -> None:
    """One that is refused has not. A wait lasts from the arrival until then."""
    passed = SimpleQueue[Ticket]()
    dispatcher, all_wait = start(warm=(1,), on_pass=passed.put), threading.Event()
    engine.on_load = lambda task_id: "Assertion failed: bad rank" if task_id == 4 else wait_for(all_wait)
    dispatcher.ask(ticket(1), Answers())
    hit = passed.get(timeout=WAIT_SECONDS)
    dispatcher.ask(ticket(2), Answers())
    miss = passed.get(timeout=WAIT_SECONDS)
    waiting, refused = [ticket(3, takes_weights=False) for _ in range(2)], Answers()
    for one in waiting:
        dispatcher.ask(one, Answers())
    dispatcher.ask(ticket(4, takes_weights=False), refused)

    assert {3: 2, 4: 1} == dispatcher.waiting()

    asked_until = time.monotonic()
    all_wait.set()
    waited = [passed.get(timeout=WAIT_SECONDS) for _ in waiting]

    assert isinstance(refused.get(), RequestError)
    assert ({}, True) == (dispatcher.waiting(), passed.empty())
    assert ["hit", "miss", "wait", "wait"] == [one.result for one in (hit, miss, *waited)]
    assert all(one.arrived_at < asked_until < one.sent_at for one in waited)
    assert hit.arrived_at < hit.sent_at < asked_until


def test_the_router_may_tell_the_end_of_a_request_as_soon_as_it_is_passed_on(start: Callable[..., Dispatcher]) -> None:
    """Before the thread that passed it on goes on. The adapter is not in use then, and is still believed.

    A load that comes later does not wait for the request.
    """
    dispatcher = start(warm=(1,))
    of_router = Ticket({1: 1}, 4, time.monotonic(), WAIT_SECONDS, takes_weights=False, is_routers=True)
    answers = Answers(meanwhile=lambda: dispatcher.end(of_router, had_it=True))
    dispatcher.ask(of_router, answers)

    assert "by id" == answers.get()
    assert ([], {1: True}, {}) == (dispatcher.in_use(), dispatcher.states(), dispatcher.waiting())

    later = Answers()
    dispatcher.ask(ticket(2), later)

    assert "with weights" == later.get()


def test_a_request_of_the_router_s_that_cannot_be_passed_on_uses_nothing(start: Callable[..., Dispatcher]) -> None:
    dispatcher, answers = start(warm=(1,)), Answers()
    answers.pass_on = lambda **_: 1 // 0  # type: ignore[assignment, method-assign]
    dispatcher.ask(Ticket({1: 1}, 4, time.monotonic(), WAIT_SECONDS, is_routers=True), answers)

    assert isinstance(answers.get(), ZeroDivisionError)
    assert [] == dispatcher.in_use()


def test_who_takes_no_weights_along_waits_for_the_load(start: Callable[..., Dispatcher], engine: Engine) -> None:
    dispatcher, answers = start(), [Answers(), Answers()]
    for one in answers:
        dispatcher.ask(ticket(2, takes_weights=False), one)

    assert ["by id", "by id"] == [one.get() for one in answers]
    assert [2] == engine.loads


def test_an_adapter_that_is_larger_than_the_cache_keeps_no_other_waiting(
    start: Callable[..., Dispatcher], engine: Engine
) -> None:
    """The engine decides: the pages that are registered may be those of an earlier config."""
    dispatcher, larger, other = start(pages=4), Answers(), Answers()
    engine.on_load = lambda task_id: FULL if task_id == 2 else None
    dispatcher.ask(ticket(2, pages=5), larger)
    dispatcher.ask(ticket(3, pages=6), other)
    refused = larger.get()

    assert isinstance(refused, AdapterUnavailable)
    assert "it takes 5 pages, and the engine's adapter cache has 4" == str(refused)
    assert "by id" == other.get()


def test_a_full_cache_is_tried_again(start: Callable[..., Dispatcher], engine: Engine) -> None:
    dispatcher, answers = start(), Answers()
    engine.on_load = lambda _: FULL if len(engine.loads) < 3 else None
    dispatcher.ask(ticket(2, takes_weights=False), answers)

    assert "by id" == answers.get()
    assert [2, 2, 2] == engine.loads


def test_weights_wait_for_none_that_were_released_later(start: Callable[..., Dispatcher], engine: Engine) -> None:
    """Two requests are released at once, and a third one comes while the first of them is passed on."""
    dispatcher, busy, second, third = start(pages=3), Answers(), Answers(), Answers()
    first = Answers(meanwhile=lambda: dispatcher.ask(ticket(4), third))
    both_wait = threading.Event()

    def load(_: int) -> str | None:
        wait_for(both_wait)
        return FULL if len(engine.loads) < 3 else None

    engine.on_load = load
    engine.tokens_of_a_load = 20  # so that what is busy has ended then
    dispatcher.ask(ticket(1, pages=3), busy)
    assert "with weights" == busy.get()
    dispatcher.ask(ticket(2, takes_weights=False), first)
    dispatcher.ask(ticket(3), second)
    both_wait.set()

    assert "by id" == first.get()
    assert ["with weights", "with weights"] == [second.get(), third.get()]


def test_an_adapter_that_the_engine_refuses_harms_no_other(start: Callable[..., Dispatcher], engine: Engine) -> None:
    """Those who wait for it are told the engine's words, without paths."""
    dispatcher, refused, other = start(), Answers(), Answers()
    engine.on_load = lambda task_id: "Assertion failed: bad rank (/src/lora.cpp:12)" if task_id == 2 else None
    dispatcher.ask(ticket(2, takes_weights=False), refused)
    dispatcher.ask(ticket(3, takes_weights=False), other)

    assert "the engine has not loaded it: Assertion failed: bad rank" == str(refused.get())
    assert "by id" == other.get()


def test_weights_that_cannot_be_read_are_an_error_for_all_who_wait(start: Callable[..., Dispatcher]) -> None:
    """None of them is sent by an id of which nothing arrived."""
    unreadable = AdapterUnavailable("it was altered on the server")
    dispatcher, answers = start(), Answers(unreadable)
    dispatcher.ask(ticket(2), answers)

    assert unreadable is answers.get()
    again = Answers()
    dispatcher.ask(ticket(2), again)

    assert "with weights" == again.get()


def test_an_engine_that_is_silent_is_left_behind(start: Callable[..., Dispatcher], engine: Engine) -> None:
    """The reason is told, and the next adapter is loaded."""
    dispatcher, refused, other = start(load_timeout=0.2), Answers(), Answers()
    speaks = threading.Event()
    engine.on_load = lambda task_id: wait_for(speaks) if task_id == 2 else None
    dispatcher.ask(ticket(2, takes_weights=False), refused)
    dispatcher.ask(ticket(3, takes_weights=False), other)
    found = refused.get()

    assert isinstance(found, EngineSilent)
    assert "the engine has not responded for 0.2 s" == str(found)
    assert "by id" == other.get()
    assert engine.was_left_behind.is_set()
    speaks.set()


def test_whose_time_is_up_is_refused_also_while_a_load_is_under_way(
    start: Callable[..., Dispatcher], engine: Engine
) -> None:
    dispatcher, late, patient = start(), Answers(), Answers()
    goes_on = threading.Event()
    engine.on_load = lambda _: wait_for(goes_on)
    dispatcher.ask(ticket(2, takes_weights=False), patient)
    dispatcher.ask(ticket(3, takes_weights=False, patience=0.1), late)
    found = late.get()

    assert isinstance(found, AdapterUnavailable)
    assert "it does not fit beside the adapters in use; waited 0.1 s; ask again" == str(found)
    goes_on.set()
    assert "by id" == patient.get()


def test_who_has_left_is_not_answered(start: Callable[..., Dispatcher], engine: Engine) -> None:
    dispatcher, gone, other = start(), Answers(), Answers()
    goes_on = threading.Event()
    engine.on_load = lambda _: wait_for(goes_on)
    dispatcher.ask(ticket(2, takes_weights=False), other)
    leaves = ticket(3, takes_weights=False)
    dispatcher.ask(leaves, gone)

    assert dispatcher.leave(leaves)
    assert not dispatcher.leave(leaves)
    goes_on.set()
    assert "by id" == other.get()
    assert gone.is_empty
    assert [2] == engine.loads


def test_what_waits_is_refused_when_the_model_is_unloaded(start: Callable[..., Dispatcher], engine: Engine) -> None:
    """Although the engine does not answer."""
    dispatcher, answers = start(), Answers()
    under_way, goes_on = threading.Event(), threading.Event()

    def load(_: int) -> None:
        under_way.set()
        goes_on.wait(WAIT_SECONDS)

    engine.on_load = load
    dispatcher.ask(ticket(2, takes_weights=False), answers)
    assert under_way.wait(WAIT_SECONDS)
    dispatcher.stop()

    assert isinstance(answers.get(), ServerStopping)
    with pytest.raises(ServerStopping):
        dispatcher.ask(ticket(2), Answers())
    goes_on.set()


def test_what_the_engine_has_lost_is_loaded_again(start: Callable[..., Dispatcher], engine: Engine) -> None:
    """It was loaded again: a probe finds out."""
    missed = SimpleQueue[int]()
    dispatcher, first, then = start(pages=1, warm=(1,), on_miss=missed.put), Answers(), Answers()
    engine.on_probe = lambda: "LoRA task 1 not found in cache. Please send LoRA weights with request"
    dispatcher.ask(ticket(1), first)
    assert "by id" == first.get()
    assert 1 == missed.get(timeout=WAIT_SECONDS)
    engine.on_probe = lambda: None
    dispatcher.ask(ticket(1), then)

    assert "by id" == then.get()
    assert [1] == engine.loads


def test_a_pinned_adapter_is_loaded_though_nobody_asks(start: Callable[..., Dispatcher], engine: Engine) -> None:
    """Again and again until the engine takes it. An error is told once, and none while the engine is not there."""
    told, loaded = SimpleQueue[str](), threading.Event()
    outcomes = iter([EngineSilent("not loaded"), ServerStopping(), "out of memory", "out of memory", None])

    def load(_: int) -> str | None:
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    engine.on_load = load
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PIN_SECONDS", "PIN_FAILED_SECONDS"):
            patch.setattr(f"tritonlora.serving.dispatcher.{name}", 0.0)
        dispatcher = start(on_error=told.put, on_load=lambda *_: loaded.set())
        dispatcher.pin({7: 1})
        assert loaded.wait(WAIT_SECONDS)

    assert [7] * 5 == engine.loads == engine.pins
    assert "the pinned adapter with lora_task_id 7 cannot be loaded" in told.get()
    assert told.empty()


def test_a_request_that_waits_for_a_pinned_adapter_is_not_refused_by_its_failure(
    start: Callable[..., Dispatcher], engine: Engine
) -> None:
    """The request has a load of its own."""
    dispatcher, answers = start(), Answers()
    under_way, goes_on = threading.Event(), threading.Event()

    def load(_: int) -> str | None:
        if engine.pins != engine.loads:
            return None
        under_way.set()
        goes_on.wait(WAIT_SECONDS)
        raise EngineSilent("not loaded")

    engine.on_load = load
    dispatcher.pin({7: 1})
    assert under_way.wait(WAIT_SECONDS)
    dispatcher.ask(ticket(7, takes_weights=False), answers)
    goes_on.set()

    assert "by id" == answers.get()
    assert [7, 7] == engine.loads


def test_a_request_that_only_loads_uses_nothing_afterwards(start: Callable[..., Dispatcher], engine: Engine) -> None:
    """It waits for a load, and goes on at once when the engine has the adapter. It counts as no request."""
    passed = list[Ticket]()
    dispatcher, first, again = start(on_pass=passed.append), Answers(), Answers()
    for answers in (first, again):
        only = Ticket({2: 1}, 0, time.monotonic(), WAIT_SECONDS, takes_weights=False, only_loads=True)
        dispatcher.ask(only, answers)
        assert "by id" == answers.get()

    assert [2] == engine.loads
    assert ([], []) == (dispatcher.in_use(), passed)
