# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""routing.py: the router's decisions, against an engine whose cache is bounded for real."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from table import TABLE, entry
from tritonlora.adapters import AdapterTable, render, with_adapter
from tritonlora.errors import AdapterTableError, AdapterUnavailable, InvalidRequest, RequestError, UnknownAdapter
from tritonlora.routing import (
    Forwarder,
    Meaning,
    PreviousIds,
    Route,
    TableFile,
    map_tensors,
    meaning_of,
    public,
    resolve,
    resolve_rows,
)

MISS = "LoRA task 1 not found in cache. Please send LoRA weights with request"
FULL = "Error storing task=4 in PEFT cache -- Cache is full. There are no done tasks to evict"
PIRATE = Route("pirate", TABLE.entries["pirate"])


def cold(task_id: int) -> Route:
    """An adapter that the engine has not been warmed with."""
    return Route(f"n{task_id}", entry(task_id, warm=False))


# Which adapter


def test_a_request_that_names_nothing_is_for_the_base_model() -> None:
    """None is the base model, and nothing else is."""
    assert resolve(TABLE, None, None) is None


@pytest.mark.parametrize(("name", "task_id"), [(b"pirate", None), ("pirate", None), (None, 1), (b"pirate", 1)])
def test_an_adapter_is_found_by_name_by_id_or_by_both(name: bytes | str | None, task_id: int | None) -> None:
    """Three ways to say the same."""
    assert resolve(TABLE, name, task_id) == PIRATE


@pytest.mark.parametrize(
    ("name", "task_id", "error", "message"),
    [
        (b"nobody", None, UnknownAdapter, "unknown LoRA adapter 'nobody'; available: haiku, pirate"),
        (b"Pirate", None, UnknownAdapter, "unknown LoRA adapter 'Pirate'"),
        (None, 7, UnknownAdapter, "unknown lora_task_id 7; available"),
        (None, 0, UnknownAdapter, "unknown lora_task_id 0"),
        (b"", None, InvalidRequest, "lora_name is empty; to ask the base model, leave it out"),
        (b"\xff", None, InvalidRequest, "not UTF-8"),
        (b"a b", None, InvalidRequest, "not a legal adapter name"),
        (b"x" * 10_000_000, None, InvalidRequest, "not a legal adapter name"),
        (b"pirate", 2, InvalidRequest, "lora_name 'pirate' has lora_task_id 1, but the request says 2"),
    ],
)
def test_what_is_not_an_adapter_is_an_error(
    name: bytes | None, task_id: int | None, error: type[RequestError], message: str
) -> None:
    """Never the base model."""
    with pytest.raises(error, match=message) as raised:
        resolve(TABLE, name, task_id)

    assert len(str(raised.value)) < 500


def test_the_codes_are_those_of_triton() -> None:
    """The router looks them up in pb_utils.TritonError."""
    assert ("NOT_FOUND", "INVALID_ARG", "UNAVAILABLE") == (
        UnknownAdapter.code,
        InvalidRequest.code,
        AdapterUnavailable.code,
    )


def test_each_row_of_a_batch_names_its_own_adapter() -> None:
    """Names per row."""
    routes = resolve_rows(TABLE, [b"pirate", b"haiku"], None, 2)

    assert [PIRATE, Route("haiku", TABLE.entries["haiku"])] == routes


def test_a_batch_for_the_base_model_has_no_routes() -> None:
    """Nothing named, in every row."""
    assert [None, None] == resolve_rows(TABLE, None, None, 2)


def test_a_batch_that_mixes_base_and_adapter_rows_is_refused() -> None:
    """The engine's inputs cannot say it."""
    with pytest.raises(InvalidRequest, match="mixes rows for the base model and for adapters"):
        resolve_rows(TABLE, [b"pirate", b""], None, 2)


def test_a_tensor_with_the_wrong_number_of_rows_is_refused() -> None:
    """One name for each row."""
    with pytest.raises(InvalidRequest, match="lora_name has 1 elements, expected one for each of the 2 rows"):
        resolve_rows(TABLE, [b"pirate"], None, 2)


# The table on disk


@pytest.fixture
def failures() -> list[str]:
    """What the table file reported."""
    return []


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.replace(path)


def test_a_changed_table_is_seen_at_once(tmp_path: Path, failures: list[str]) -> None:
    """No restart."""
    path = tmp_path / "adapters.json"
    path.write_text(render(TABLE))
    file = TableFile(path, failures.append)
    changed = with_adapter(TABLE, "new", entry(3))
    _replace(path, render(changed))

    assert changed == file.table()
    assert failures == []


@pytest.mark.parametrize("damage", ["{", None])
def test_a_bad_table_leaves_the_last_good_one_and_is_reported_once(
    tmp_path: Path, failures: list[str], damage: str | None
) -> None:
    """Malformed or gone; and the next good one counts again."""
    path = tmp_path / "adapters.json"
    path.write_text(render(TABLE))
    file = TableFile(path, failures.append)
    if damage is None:
        path.unlink()
    else:
        _replace(path, damage)

    assert TABLE == file.table()
    assert TABLE == file.table()
    assert 1 == len(failures)
    assert "keeping the last good adapters.json" in failures[0]

    _replace(path, render(AdapterTable()))

    assert AdapterTable() == file.table()


def test_there_must_be_a_good_table_to_begin_with(tmp_path: Path, failures: list[str]) -> None:
    """A router without a table does not start."""
    with pytest.raises(AdapterTableError, match="cannot read"):
        TableFile(tmp_path / "adapters.json", failures.append)


# An adapter's tensors


def _write_tensors(root: Path, weights: bytes, config: bytes) -> None:
    directory = root / "tensorrt_llm" / "warmup"
    directory.mkdir(parents=True)
    (directory / "adapter_model_1.bin").write_bytes(weights)
    (directory / "adapter_config_1.bin").write_bytes(config)


def test_tensors_are_mapped_as_they_are_on_disk(tmp_path: Path) -> None:
    """bfloat16 from little-endian bytes, with a leading batch dim."""
    _write_tensors(tmp_path, b"\x80\x3f" * (6 * 56), b"\x02\x00\x00\x00" * 18)  # 0x3f80 is 1.0
    lora_weights, lora_config = map_tensors(tmp_path, PIRATE)

    assert (torch.bfloat16, (1, 6, 56)) == (lora_weights.dtype, tuple(lora_weights.shape))
    assert torch.equal(torch.ones(1, 6, 56, dtype=torch.bfloat16), lora_weights)
    assert torch.equal(torch.full((1, 6, 3), 2, dtype=torch.int32), lora_config)


@pytest.mark.parametrize(("weights", "config"), [(671, 72), (673, 72), (672, 71)])
def test_a_file_of_the_wrong_size_makes_the_adapter_unavailable(tmp_path: Path, weights: int, config: int) -> None:
    """Mapped, it would be other weights or a bus error. The message has no path of the server."""
    _write_tensors(tmp_path, bytes(weights), bytes(config))

    with pytest.raises(AdapterUnavailable, match="LoRA adapter 'pirate': .* bytes on the server, expected") as raised:
        map_tensors(tmp_path, PIRATE)

    assert str(tmp_path) not in str(raised.value)


def test_a_missing_file_makes_the_adapter_unavailable(tmp_path: Path) -> None:
    """Named, and again without the server's path."""
    with pytest.raises(AdapterUnavailable, match="adapter_model_1.bin is missing on the server") as raised:
        map_tensors(tmp_path, PIRATE)

    assert str(tmp_path) not in str(raised.value)


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
                return MISS
            if len(self.cached) == self.capacity:
                idle = [cached for cached in self.cached if cached not in self.in_use]
                if not idle:
                    return FULL
                self.cached.remove(idle[0])
            self.cached.append(task_id)
        self.in_use.append(task_id)
        return None


def forwarder(**times: float) -> Forwarder[str]:
    """A forwarder for Engine's answers; the engine was started with adapter 1."""
    return Forwarder(lambda answer: answer[1:] if answer.startswith("!") else None, warmed=[1], **times)


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


def test_previous_ids_are_the_last_tokens_of_the_stream() -> None:
    """In order, and bounded."""
    previous_ids = PreviousIds()
    previous_ids.add([1, 2])
    previous_ids.add([])

    assert [1, 2] == previous_ids.ids()

    previous_ids.add(range(100))

    assert list(range(100 - PreviousIds.COUNT, 100)) == previous_ids.ids()


def test_the_stat_of_an_unchanged_table_is_all_that_a_request_costs(tmp_path: Path, failures: list[str]) -> None:
    """The same object comes back as long as the file is the same."""
    path = tmp_path / "adapters.json"
    path.write_text(render(TABLE))
    file = TableFile(path, failures.append)
    before = os.stat(path)  # noqa: PTH116

    assert file.table() is file.table()
    assert before.st_mtime_ns == path.stat().st_mtime_ns
