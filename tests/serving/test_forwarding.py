# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""forwarding.py: the router's decisions, against an engine whose cache is bounded for real.

An instance of the router is a process; here it is a thread with a descriptor of its own for what they share, which
`flock` takes for the same.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from table import TABLE, entry
from tritonlora.errors import AdapterUnavailable, ClientLeft
from tritonlora.serving.engine_errors import Meaning, is_unavailable, meaning_of, public
from tritonlora.serving.forwarding import Forwarder
from tritonlora.serving.residency import open_residency
from tritonlora.serving.routing import Route, content_of

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


ONCE, AGAIN_WITH_WEIGHTS, UNTIL_ROOM = "once", "again with weights", "until there is room"
FETCHING = "Encountered an error when fetching new request: "
ASYNC = "Encountered an error in forwardAsync function: "
COPY = "Caught exception during copyTask ensure batch -- "
THROWN = " (/src/cpp/tensorrt_llm/batch_manager/peftCacheManager.cpp:432)\n1       0x7f tensorrt_llm::common::throw"
GOLDEN = json.loads((Path(__file__).parents[1] / "support" / "golden" / "lora_cache.json").read_text())
REFUSED = sorted({case[-1] for case in GOLDEN["validation"] if case[-1]})
# What the engine says -> how often the router sends the request. The texts are those of TensorRT-LLM's executed code.
ENGINE_TEXTS = [
    (MISS, AGAIN_WITH_WEIGHTS),
    (FETCHING + FULL, UNTIL_ROOM),
    (f"{FETCHING}Error storing task=3 in PEFT cache -- {FULL}{THROWN}", UNTIL_ROOM),
    (f"{FETCHING}Error storing task=3 in PEFT cache -- Assertion failed: pageIds.has_value(){THROWN}", UNTIL_ROOM),
    (f"{ASYNC}slice 128 exceeds buffer size 64", ONCE),
    (f"{ASYNC}{COPY}can't move a processing task taskId=3", ONCE),
    (f"{ASYNC}{COPY}Couldn't claim pages during copyTask -- {FULL}", ONCE),
    (f"{COPY}Couldn't claim pages during copyTask -- Assertion failed: pageIds.has_value()", ONCE),
    (f"{ASYNC}Caught Exception while storing peft weights -- {FULL}", ONCE),
    (f"{ASYNC}any other text -- {FULL}", ONCE),
    ("Not enough space allocated to device LoRA cache to hold 1 max sized LoRA 34 < 2048", ONCE),
    ("[TensorRT-LLM][ERROR] Assertion failed: !peftValues.empty()", ONCE),
    *((f"{FETCHING}[TensorRT-LLM][ERROR] Assertion failed: {text}{THROWN}", ONCE) for text in REFUSED),
]


@pytest.mark.parametrize("prefix", ["", "Executor failed process requestId 1 due to the following error: "])
@pytest.mark.parametrize(("text", "sent"), ENGINE_TEXTS)
def test_what_the_router_makes_of_each_error_of_the_engine(tmp_path: Path, prefix: str, text: str, sent: str) -> None:
    """Trouble of the device, and what validation refuses, is the client's at once; only a full cache is waited for."""
    residency = open_residency(tmp_path / "shared", {1: 1})
    tried: list[bool] = []

    def send(attach: bool) -> Iterator[str]:
        tried.append(attach)
        yield f"!{prefix}{text}"

    forwarder: Forwarder[str] = Forwarder(residency, lambda answer: answer[1:], cache_full_timeout=0.05)
    try:
        got = list(forwarder.forward(PIRATE, send))
    except AdapterUnavailable as error:
        got = [str(error)]

    if sent == UNTIL_ROOM:
        assert len(tried) > 1
        assert "does not fit beside the adapters in use" in got[0]
    else:
        assert [f"!{prefix}{text}"] == got[-1:]
        assert {ONCE: [False], AGAIN_WITH_WEIGHTS: [False, True]}[sent] == tried


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


@pytest.mark.parametrize(
    ("error", "unavailable"),
    [
        ("Failed for execute the inference request. Model 'tensorrt_llm' is not ready.", True),
        ("Request for unknown model: 'tensorrt_llm' is not found", True),
        ("Stub process 'tensorrt_llm_0_0' is not healthy.", True),
        ("Server is stopping, scheduler for model has stopped accepting new inference requests: shutting down", True),
        ("lora module attn_q not enabled for this model", False),
    ],
)
def test_a_model_that_triton_cannot_ask_now_is_unavailable(error: str, unavailable: bool) -> None:
    """Triton itself says INTERNAL."""
    assert unavailable == is_unavailable(error)


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
                if error:
                    self.loading.discard(task_id)
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
                return MISS
            if len(self.cached) == self.capacity:
                idle = [cached for cached in self.cached if cached not in self.in_use]
                if not idle:
                    return FULL
                self.cached.remove(idle[0])
            self.cached.append(task_id)
        self.in_use.append(task_id)
        return None


Instance = Callable[..., Forwarder[str]]


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[Instance]:
    """Forwarders for Engine's answers, one for each instance of a router; the engine was started with adapter 1."""
    with contextlib.ExitStack() as stack:

        def open_one(cache_pages: int | None = None, **options: Any) -> Forwarder[str]:
            opened = open_residency(tmp_path / "shared", {1: 1}, cache_pages)
            residency = stack.enter_context(contextlib.closing(opened))
            return Forwarder(residency, lambda answer: answer[1:] if answer.startswith("!") else None, **options)

        yield open_one


def answers(task_id: int, tokens: int = 3) -> list[str]:
    """What Engine answers for an adapter."""
    return [f"{task_id}:{token}" for token in range(tokens)]


def test_a_base_request_goes_through_untouched(instance: Instance) -> None:
    """Sent once, without weights, and its errors are the client's."""
    sent = []

    def send(attach: bool) -> list[str]:
        sent.append(attach)
        return [f"!{MISS}"]

    assert [f"!{MISS}"] == list(instance().forward(None, send))
    assert [False] == sent


def test_a_warm_adapter_is_asked_for_without_weights(instance: Instance) -> None:
    """Ready at start: the id alone."""
    engine = Engine(1)
    engine.cached = [1]

    assert answers(1) == list(instance().forward(PIRATE, engine.sender(PIRATE)))
    assert [] == engine.weights_sent


def test_an_evicted_adapter_comes_back_without_the_client_noticing(instance: Instance) -> None:
    """A miss is answered by sending the weights, once."""
    engine = Engine(1)

    assert answers(1) == list(instance().forward(PIRATE, engine.sender(PIRATE)))
    assert [1] == engine.weights_sent


def test_a_cold_adapter_brings_its_weights_the_first_time_only(instance: Instance) -> None:
    """No failing request first, and none after."""
    engine, shared = Engine(1), instance()
    for _ in range(2):
        assert answers(5) == list(shared.forward(cold(5), engine.sender(cold(5))))

    assert [5] == engine.weights_sent


def test_an_adapter_counts_as_loaded_only_after_an_answer(instance: Instance) -> None:
    """A load that failed is tried again by the next request."""
    shared = instance()

    assert ["!out of luck"] == list(shared.forward(cold(5), lambda attach: ["!out of luck"]))

    engine = Engine(1)
    assert answers(5) == list(shared.forward(cold(5), engine.sender(cold(5))))
    assert [5] == engine.weights_sent


def test_an_error_is_passed_on_and_not_retried(instance: Instance) -> None:
    """Only the cache's state is a reason to send again."""
    sent = []

    def send(attach: bool) -> list[str]:
        sent.append(attach)
        return ["!lora module attn_q not enabled for this model"]

    assert ["!lora module attn_q not enabled for this model"] == list(instance().forward(PIRATE, send))
    assert [False] == sent


def test_a_miss_after_the_first_answer_is_an_error_and_never_a_repeat(instance: Instance) -> None:
    """Sending again would repeat text."""
    sent = []

    def send(attach: bool) -> list[str]:
        sent.append(attach)
        return ["1:0", f"!{MISS}"]

    assert ["1:0", f"!{MISS}"] == list(instance().forward(PIRATE, send))
    assert [False] == sent


def test_a_miss_in_spite_of_weights_is_passed_on(instance: Instance) -> None:
    """An engine that will not learn must not be asked for ever."""
    sent = []

    def send(attach: bool) -> list[str]:
        sent.append(attach)
        return [f"!{MISS}"]

    assert [f"!{MISS}"] == list(instance().forward(PIRATE, send))
    assert [False, True] == sent


def test_a_request_before_which_others_always_lose_the_adapter_loads_it_in_the_end(instance: Instance) -> None:
    """Although each time it is believed to be held again."""
    other = instance()
    sent = []

    def send(attach: bool) -> list[str]:
        sent.append(attach)
        if attach:
            return answers(1)
        other._residency.missed(1, other._residency.belief(1))
        other._residency.accepted(1, 1)
        other._residency.ended()
        return [f"!{MISS}"]

    assert answers(1) == list(instance().forward(PIRATE, send))
    assert sent.pop()
    assert {False} == set(sent)


def test_many_adapters_share_a_small_cache_without_an_error(instance: Instance) -> None:
    """40 adapters, a cache of 4, 16 requests at a time: every answer is its own adapter's."""
    engine = Engine(4)
    routes = [cold(1 + number * 7 % 40) for number in range(1000)]
    own = threading.local()

    def ask(route: Route) -> list[str]:
        return list(own.instance.forward(route, engine.sender(route)))

    with ThreadPoolExecutor(16, initializer=lambda: setattr(own, "instance", instance())) as pool:
        results = list(pool.map(ask, routes))

    assert [answers(route.entry.lora_task_id) for route in routes] == results
    assert not engine.loaded_twice_at_once
    assert [] == engine.in_use


def test_requests_that_come_while_an_adapter_is_loaded_wait_for_it(instance: Instance) -> None:
    """One load, whatever the number of requests."""
    engine = Engine(1)
    engine.hold[5] = threading.Event()
    streams = [instance().forward(cold(5), engine.sender(cold(5))) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(list, stream) for stream in streams]
        engine.hold[5].set()
        results = [future.result(timeout=10) for future in futures]

    assert [answers(5)] * 8 == results
    assert [5] == engine.weights_sent


def test_when_the_one_that_loads_fails_the_next_one_loads(instance: Instance) -> None:
    """The wait ends with a try of one's own."""
    one, other = instance(), instance()
    first_sends, release = threading.Event(), threading.Event()
    engine = Engine(1)

    def failing(attach: bool) -> Iterator[str]:
        first_sends.set()
        release.wait(10)
        yield "!broken"

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: list(one.forward(cold(5), failing)))
        assert first_sends.wait(10)
        second = pool.submit(lambda: list(other.forward(cold(5), engine.sender(cold(5)))))
        release.set()

        assert ["!broken"] == first.result(timeout=10)
        assert answers(5) == second.result(timeout=10)
    assert [5] == engine.weights_sent


def test_a_full_cache_is_waited_for(instance: Instance) -> None:
    """Every cached adapter in use: the request is answered as soon as one is not."""
    engine, one, other = Engine(1), instance(), instance(retry_interval=5.0)
    engine.hold[1] = threading.Event()
    running = one.forward(cold(1), engine.sender(cold(1)))
    assert next(running) == "1:0"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: list(other.forward(cold(2), engine.sender(cold(2)))))
        while 2 not in engine.weights_sent:
            assert not waiting.done()
        engine.hold[1].set()

        assert ["1:1", "1:2"] == list(running)
        assert answers(2) == waiting.result(timeout=4)


def test_a_cache_that_stays_full_makes_the_adapter_unavailable(instance: Instance) -> None:
    """Bounded, and with that reason."""
    with pytest.raises(AdapterUnavailable, match=r"LoRA adapter 'n5' does not fit beside the adapters in use"):
        list(instance(cache_full_timeout=0.05, retry_interval=0.01).forward(cold(5), lambda attach: [f"!{FULL}"]))


def test_a_client_that_leaves_leaves_the_line(instance: Instance) -> None:
    """Long before its time there is up; and the next in line takes its place."""
    engine, one, other = Engine(1), instance(), instance(retry_interval=0.01)
    engine.hold[1] = threading.Event()
    running = one.forward(cold(1), engine.sender(cold(1)))
    assert next(running) == "1:0"
    asked: list[bool] = []

    def has_left() -> bool:
        asked.append(other._residency.waiting() == [2])
        return True

    with pytest.raises(ClientLeft, match="the client has left"):
        list(other.forward(cold(2), engine.sender(cold(2)), has_left))

    assert [True] == asked
    assert [] == other._residency.waiting()
    engine.hold[1].set()
    assert ["1:1", "1:2"] == list(running)


def test_who_has_left_is_sent_for_no_more(instance: Instance) -> None:
    """The engine said meanwhile that it wants the weights."""
    sent: list[bool] = []

    def miss(attach: bool) -> Iterator[str]:
        sent.append(attach)
        yield f"!{MISS}"

    with pytest.raises(ClientLeft, match="the client has left"):
        list(instance().forward(PIRATE, miss, lambda: True))

    assert [False] == sent


@contextlib.contextmanager
def a_load_that_takes_long(one: Forwarder[str]) -> Iterator[Callable[[bool], Iterator[str]]]:
    """One instance loads adapter 5 meanwhile; the function that it sends with."""
    started, release = threading.Event(), threading.Event()

    def stuck(attach: bool) -> Iterator[str]:
        started.set()
        release.wait(10)
        yield "5:0"

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(lambda: list(one.forward(cold(5), stuck)))
        assert started.wait(10)
        yield stuck
        release.set()

        assert ["5:0"] == first.result(timeout=10)


def test_a_client_that_leaves_does_not_wait_for_another_one_s_load(instance: Instance) -> None:
    """Nor does it take the load over."""
    one, other = instance(), instance()
    with a_load_that_takes_long(one) as send, pytest.raises(ClientLeft):
        list(other.forward(cold(5), send, lambda: True))


def test_a_load_that_never_ends_does_not_hold_up_the_others_for_ever(instance: Instance) -> None:
    """Bounded, and with that reason."""
    one, other = instance(), instance(load_timeout=0.05)
    with (
        a_load_that_takes_long(one) as send,
        pytest.raises(AdapterUnavailable, match="'n5' is still being loaded for another request"),
    ):
        list(other.forward(cold(5), send))


def test_an_exception_while_sending_frees_the_adapter_for_others(instance: Instance) -> None:
    """No claim survives its request."""
    shared, engine = instance(), Engine(1)

    def broken(attach: bool) -> list[str]:
        raise OSError("no shared memory left")

    with pytest.raises(OSError, match="no shared memory left"):
        list(shared.forward(cold(5), broken))

    assert answers(5) == list(shared.forward(cold(5), engine.sender(cold(5))))


def test_what_cannot_be_resident_brings_its_weights_at_once(instance: Instance) -> None:
    """With the cache's size known, no request fails first: the engine is asked once for each."""
    engine, shared = Engine(3), instance(cache_pages=3)
    engine.cached = [1]
    asked = []
    for number in range(40):
        route = cold(1 + number % 5)
        send = engine.sender(route)

        def counted(attach: bool, send: Callable[[bool], Iterator[str]] = send) -> Iterator[str]:
            asked.append(attach)
            return send(attach)

        assert answers(route.entry.lora_task_id) == list(shared.forward(route, counted))
    assert [False, *[True] * 39] == asked


def test_an_id_that_was_given_to_other_weights_is_unavailable(instance: Instance) -> None:
    """Whatever the engine would answer: nothing is sent."""
    engine, forwarder = Engine(2), instance()
    first = cold(7)
    second = replace(first, entry=replace(first.entry, lora_weights_sha256="f" * 64))
    assert forwarder._residency.gives(7, content_of(first.entry))
    with pytest.raises(AdapterUnavailable, match="lora_task_id 7 was given to other weights"):
        list(forwarder.forward(second, engine.sender(second)))

    assert [] == engine.weights_sent == engine.cached
    assert answers(7) == list(forwarder.forward(first, engine.sender(first)))


def test_each_load_is_reported_with_its_reason(instance: Instance) -> None:
    """First use, or evicted since; a request that brings no weights is no load."""
    loads: list[tuple[str, str]] = []
    engine = Engine(1)
    shared = instance(on_load=lambda route, reason, seconds: loads.append((route.lora_name, reason)))
    for task_id in (5, 5, 6, 5, 1):
        assert answers(task_id) == list(shared.forward(cold(task_id), engine.sender(cold(task_id))))

    assert [("n5", "first_use"), ("n6", "first_use"), ("n5", "evicted"), ("n1", "evicted")] == loads
