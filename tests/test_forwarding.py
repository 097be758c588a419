# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""forwarding.py and residency.py: when weights travel along, against an engine whose cache is bounded for real."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from table import TABLE, entry
from tritonlora.errors import AdapterUnavailable
from tritonlora.forwarding import Forwarder, Meaning, meaning_of, public
from tritonlora.routing import Route

MISS = "LoRA task 1 not found in cache. Please send LoRA weights with request"
FULL = "Error storing task=4 in PEFT cache -- Cache is full. There are no done tasks to evict"
PIRATE = Route("pirate", TABLE.entries["pirate"])


def cold(task_id: int) -> Route:
    """An adapter that the engine has not been warmed with."""
    return Route(f"n{task_id}", entry(task_id, warm=False))


# What an engine error means


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (None, Meaning.ANSWER),
        (MISS, Meaning.MISS),
        (f"Executor failed process requestId 1 due to the following error: {MISS}", Meaning.MISS),
        (f"Cannot process new request: [TensorRT-LLM][ERROR] Assertion failed: {MISS} (/a/b.cpp:1)", Meaning.MISS),
        (f"Encountered an error when fetching new request: {FULL}", Meaning.FULL),
        ("Error storing task=5 in PEFT cache -- Assertion failed: pageIds.has_value() (/x/y.cpp:9)", Meaning.FULL),
        ("Assertion failed: lora module attn_q not enabled for this model", Meaning.ERROR),
        ("", Meaning.ERROR),
    ],
)
def test_an_engine_error_is_understood_whatever_surrounds_it(error: str | None, meaning: Meaning) -> None:
    """Prefixes and suffixes differ between versions and backends."""
    assert meaning is meaning_of(error)


def test_backtraces_and_paths_stay_on_the_server() -> None:
    """What is left says what is wrong."""
    error = (
        "Executor failed process requestId 1 due to the following error: Encountered an error when fetching new "
        "request: [TensorRT-LLM][ERROR] Assertion failed: Expected lora weights to be the same data type as base model "
        "(/home/jenkins/agent/TensorRT-LLM/cpp/tensorrt_llm/runtime/loraUtils.cpp:66)\n"
        "1       0x7f2c8ab0a1c6 /opt/tritonserver/backends/tensorrtllm/libtensorrt_llm.so(+0x7cb1c6)\n"
        "2       0x7f2c8c9f9e3b tensorrt_llm::runtime::lora::loraValidateRequestTensors + 2059"
    )

    assert public(error).endswith("Expected lora weights to be the same data type as base model")
    assert public("cannot open /data/models/x.bin now") == "cannot open <path> now"
    assert public("rank 8/16 and/or https://a.b/c") == "rank 8/16 and/or https://a.b/c"


# When weights travel along


class Engine:
    """Answers like the engine: a cache of `capacity` adapters, in which those in use cannot be evicted."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.cached: list[int] = []  # least recently completed first
        self.in_use: list[int] = []
        self.lock = threading.Lock()
        self.weights_sent: list[int] = []
        self.loading: set[int] = set()
        self.loaded_twice_at_once = False
        self.misses = 0
        self.hold: dict[int, threading.Event] = {}

    def sender(self, route: Route, tokens: int = 3) -> Callable[[bool], Iterator[str]]:
        """`send` for one request: answers "task:token", errors begin with "!"."""
        task_id = route.entry.lora_task_id

        def send(attach: bool) -> Iterator[str]:
            with self.lock:
                if attach:
                    self.weights_sent.append(task_id)
                    self.loaded_twice_at_once |= task_id in self.loading
                    self.loading.add(task_id)
                error = self._admit(task_id, attach)
            try:
                if error:
                    yield f"!{error}"
                    return
                for token in range(tokens):
                    yield f"{task_id}:{token}"
                    with self.lock:
                        self.loading.discard(task_id)
                    if task_id in self.hold:
                        self.hold[task_id].wait(10)
            finally:
                with self.lock:
                    self.loading.discard(task_id)
                    if not error:
                        self.in_use.remove(task_id)
                        self.cached.remove(task_id)
                        self.cached.append(task_id)

        return send

    def _admit(self, task_id: int, attach: bool) -> str | None:
        if task_id not in self.cached:
            if not attach:
                self.misses += 1
                return MISS
            if len(self.cached) == self.capacity:
                idle = [cached for cached in self.cached if cached not in self.in_use]
                if not idle:
                    return FULL
                self.cached.remove(idle[0])
            self.cached.append(task_id)
        self.in_use.append(task_id)
        return None


def forwarder(**options: Any) -> Forwarder[str]:
    """A forwarder for Engine's answers; the engine was started with adapter 1."""
    return Forwarder(lambda answer: answer[1:] if answer.startswith("!") else None, warmed=[PIRATE.entry], **options)


def answers(task_id: int, tokens: int = 3) -> list[str]:
    """What Engine answers for an adapter."""
    return [f"{task_id}:{token}" for token in range(tokens)]


def test_a_base_request_goes_through_untouched() -> None:
    """Sent once, without weights, and its errors are the client's."""
    sent = []

    def send(attach: bool) -> list[str]:
        sent.append(attach)
        return [f"!{MISS}"]

    assert [f"!{MISS}"] == list(forwarder().forward(None, send))
    assert [False] == sent


def test_a_warm_adapter_is_asked_for_without_weights() -> None:
    """Ready at start: the id alone."""
    engine = Engine(1)
    engine.cached = [1]

    assert answers(1) == list(forwarder().forward(PIRATE, engine.sender(PIRATE)))
    assert [] == engine.weights_sent


def test_an_evicted_adapter_comes_back_without_the_client_noticing() -> None:
    """A miss is answered by sending the weights, once."""
    engine = Engine(1)

    assert answers(1) == list(forwarder().forward(PIRATE, engine.sender(PIRATE)))
    assert [1] == engine.weights_sent


def test_a_cold_adapter_brings_its_weights_the_first_time_only() -> None:
    """No failing request first, and none after."""
    engine, shared = Engine(1), forwarder()
    for _ in range(2):
        assert answers(5) == list(shared.forward(cold(5), engine.sender(cold(5))))

    assert [5] == engine.weights_sent


def test_an_adapter_counts_as_loaded_only_after_an_answer() -> None:
    """A load that failed is tried again by the next request."""
    shared = forwarder()

    assert ["!out of luck"] == list(shared.forward(cold(5), lambda attach: ["!out of luck"]))

    engine = Engine(1)
    assert answers(5) == list(shared.forward(cold(5), engine.sender(cold(5))))
    assert [5] == engine.weights_sent


def test_an_error_is_passed_on_and_not_retried() -> None:
    """Only the cache's state is a reason to send again."""
    sent = []

    def send(attach: bool) -> list[str]:
        sent.append(attach)
        return ["!lora module attn_q not enabled for this model"]

    assert ["!lora module attn_q not enabled for this model"] == list(forwarder().forward(PIRATE, send))
    assert [False] == sent


def test_a_miss_after_the_first_answer_is_an_error_and_never_a_repeat() -> None:
    """Sending again would repeat text."""
    sent = []

    def send(attach: bool) -> list[str]:
        sent.append(attach)
        return ["1:0", f"!{MISS}"]

    assert ["1:0", f"!{MISS}"] == list(forwarder().forward(PIRATE, send))
    assert [False] == sent


def test_a_miss_in_spite_of_weights_is_passed_on() -> None:
    """An engine that will not learn must not be asked for ever."""
    sent = []

    def send(attach: bool) -> list[str]:
        sent.append(attach)
        return [f"!{MISS}"]

    assert [f"!{MISS}"] == list(forwarder().forward(PIRATE, send))
    assert [False, True] == sent


def test_many_adapters_share_a_small_cache_without_an_error() -> None:
    """40 adapters, a cache of 4, 16 requests at a time: every answer is its own adapter's."""
    engine, shared = Engine(4), forwarder()
    routes = [cold(1 + number * 7 % 40) for number in range(1000)]

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda route: list(shared.forward(route, engine.sender(route))), routes))

    assert [answers(route.entry.lora_task_id) for route in routes] == results
    assert not engine.loaded_twice_at_once
    assert [] == engine.in_use


def test_what_cannot_be_held_any_more_is_sent_with_its_weights_at_once() -> None:
    """With the cache's size known, cyclic requests never fail first; the oldest idle one is what the engine drops."""
    engine, shared = Engine(4), forwarder(cache_pages=4)
    engine.cached = [1]
    for number in range(60):
        route = cold(1 + number % 6)
        list(shared.forward(route, engine.sender(route)))

    assert 0 == engine.misses
    assert 59 == len(engine.weights_sent)  # all but the first, which was warm


def test_what_may_still_be_held_is_asked_for_by_its_id() -> None:
    """Weights are not sent for the sake of caution."""
    engine, shared = Engine(4), forwarder(cache_pages=4)
    for number in range(60):
        route = cold(2 + number % 4)
        list(shared.forward(route, engine.sender(route)))

    assert [2, 3, 4, 5] == engine.weights_sent


def test_requests_that_do_not_fit_are_not_even_tried() -> None:
    """With the cache's size known, no weights are sent to be refused."""
    engine, shared = Engine(1), forwarder(cache_pages=1, retry_interval=60.0)
    engine.hold[2] = threading.Event()
    running = shared.forward(cold(2), engine.sender(cold(2)))
    assert next(running) == "2:0"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: list(shared.forward(cold(3), engine.sender(cold(3)))))
        engine.hold[2].set()

        assert ["2:1", "2:2"] == list(running)
        assert answers(3) == waiting.result(timeout=4)
    assert [2, 3] == engine.weights_sent


def test_the_first_to_wait_is_the_first_to_be_served() -> None:
    """Requests for other adapters do not overtake."""
    engine, shared = Engine(1), forwarder()
    engine.hold[2] = threading.Event()
    running = shared.forward(cold(2), engine.sender(cold(2)))
    assert next(running) == "2:0"
    served: list[int] = []

    def one(task_id: int) -> None:
        for answer in shared.forward(cold(task_id), engine.sender(cold(task_id), tokens=1)):
            served.append(int(answer.split(":")[0]))

    with ThreadPoolExecutor(5) as pool:
        futures = []
        for place, task_id in enumerate((3, 4, 5, 6, 7)):
            futures.append(pool.submit(one, task_id))
            while len(shared.waiting()) <= place:
                pass
        engine.hold[2].set()
        list(running)
        for future in futures:
            future.result(timeout=10)

    assert [3, 4, 5, 6, 7] == served


def test_loads_are_reported_with_their_reason() -> None:
    """Once each, when the engine has taken the adapter."""
    engine, loads = Engine(1), []
    shared = forwarder(on_load=lambda route, reason, seconds: loads.append((route.lora_name, reason, seconds >= 0)))
    for route in (PIRATE, cold(2), PIRATE, cold(2)):
        list(shared.forward(route, engine.sender(route)))

    assert [
        ("pirate", "evicted", True),
        ("n2", "first_use", True),
        ("pirate", "evicted", True),
        ("n2", "evicted", True),
    ] == loads


def test_requests_that_come_while_an_adapter_is_loaded_wait_for_it() -> None:
    """One load, whatever the number of requests."""
    engine, shared = Engine(1), forwarder()
    engine.hold[5] = threading.Event()
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(lambda: list(shared.forward(cold(5), engine.sender(cold(5))))) for _ in range(8)]
        engine.hold[5].set()
        results = [future.result(timeout=10) for future in futures]

    assert [answers(5)] * 8 == results
    assert [5] == engine.weights_sent


def test_when_the_one_that_loads_fails_the_next_one_loads() -> None:
    """The wait ends with a try of one's own."""
    shared = forwarder()
    first_sends, release = threading.Event(), threading.Event()
    engine = Engine(1)

    def failing(attach: bool) -> Iterator[str]:
        first_sends.set()
        release.wait(10)
        yield "!broken"

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: list(shared.forward(cold(5), failing)))
        assert first_sends.wait(10)
        second = pool.submit(lambda: list(shared.forward(cold(5), engine.sender(cold(5)))))
        release.set()

        assert ["!broken"] == first.result(timeout=10)
        assert answers(5) == second.result(timeout=10)
    assert [5] == engine.weights_sent


def test_a_full_cache_is_waited_for() -> None:
    """Every cached adapter in use: the request is answered as soon as one is not."""
    engine, shared = Engine(1), forwarder(retry_interval=5.0)
    engine.hold[1] = threading.Event()
    running = shared.forward(cold(1), engine.sender(cold(1)))
    assert next(running) == "1:0"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: list(shared.forward(cold(2), engine.sender(cold(2)))))
        while 2 not in engine.weights_sent:
            assert not waiting.done()
        engine.hold[1].set()

        assert ["1:1", "1:2"] == list(running)
        assert answers(2) == waiting.result(timeout=4)


def test_a_cache_that_stays_full_makes_the_adapter_unavailable() -> None:
    """Bounded, and with that reason."""
    with pytest.raises(AdapterUnavailable, match=r"LoRA adapter 'n5' does not fit beside the adapters in use"):
        list(forwarder(cache_full_timeout=0.05, retry_interval=0.01).forward(cold(5), lambda attach: [f"!{FULL}"]))


def test_a_load_that_never_ends_does_not_hold_up_the_others_for_ever() -> None:
    """Bounded, and with that reason."""
    shared = forwarder(load_timeout=0.05)
    started, release = threading.Event(), threading.Event()

    def stuck(attach: bool) -> Iterator[str]:
        started.set()
        release.wait(10)
        yield "5:0"

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(lambda: list(shared.forward(cold(5), stuck)))
        assert started.wait(10)
        with pytest.raises(AdapterUnavailable, match="'n5' is still being loaded for another request"):
            list(shared.forward(cold(5), stuck))
        release.set()

        assert ["5:0"] == first.result(timeout=10)


def test_a_client_that_left_is_not_waited_for() -> None:
    """Its request ends at the next chance, with nothing sent."""
    sent = []

    def send(attach: bool) -> list[str]:
        sent.append(attach)
        return [f"!{FULL}"]

    assert [] == list(forwarder().forward(cold(5), send, is_cancelled=lambda: True))
    assert [True] == sent


def test_an_exception_while_sending_frees_the_adapter_for_others() -> None:
    """No claim survives its request."""
    shared, engine = forwarder(), Engine(1)

    def broken(attach: bool) -> list[str]:
        raise OSError("no shared memory left")

    with pytest.raises(OSError, match="no shared memory left"):
        list(shared.forward(cold(5), broken))

    assert answers(5) == list(shared.forward(cold(5), engine.sender(cold(5))))
