# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Engines that fail, and models that come and go under load, on a real tritonserver."""

from __future__ import annotations

import contextlib
import functools
import http.client
import itertools
import json
import operator
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tritonclient.utils import InferenceServerException

from asking import ROUTER, Question, Tensors, grpc_stream
from repositories import synthetic_repository
from synthetic import EXPLICIT, ask, await_sample, control, expected
from tritonlora.bench.processes import processes_of
from tritonlora.errors import ServerError
from tritonlora.files import write_text
from tritonlora.launch.server import Server
from tritonlora.pbtxt.text_format import parse
from tritonlora.repository.model_configs import set_parameters
from tritonlora.repository.paths import Repository, read_table, read_text

Launch = Callable[..., Server]
# An engine that does as it is told by request_output_len.
TELL, SILENCE, RAISE, BREAK, BREAK_AND_END, PAUSE, NEVER = 1, 2, 3, 4, 5, 6, 7
PUPPET = """
import json
import threading
import time
import numpy as np
import triton_python_backend_utils as pb_utils


def answer(text):
    ids = np.array([[list(text.encode())]], np.int32)
    lengths = np.array([[ids.size]], np.int32)
    return pb_utils.InferenceResponse([pb_utils.Tensor("output_ids", ids), pb_utils.Tensor("sequence_length", lengths)])


PAUSED = []


def pause(sender):
    sender.send(answer("half"))
    time.sleep(2)
    for _ in range(3):
        sender.send(answer("more"))
        time.sleep(0.2)
    sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
    PAUSED.append(sender)


class TritonPythonModel:
    def execute(self, requests):
        self.kept = []
        for request in requests:
            sender = request.get_response_sender()
            told = pb_utils.get_input_tensor_by_name(request, "request_output_len").as_numpy().item()
            if told == 6:
                threading.Thread(target=pause, args=[sender]).start()
                continue
            if told == 7:
                self.kept.append(sender)
                continue
            if told == 3:
                raise ValueError("the engine is out of its mind")
            if told == 1:
                seen = [request.request_id(), request.correlation_id(), request.timeout(), request.parameters()]
                seen.append(len(PAUSED))
                sender.send(answer(json.dumps(seen)))
            if told == 4:
                sender.send(answer("half"))
                error = pb_utils.TritonError("broken at /opt/engine/x.cpp")
                sender.send(pb_utils.InferenceResponse(error=error))
            final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
            if told == 5:
                sender.send(answer("half"))
                sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError("broken")), final)
            else:
                sender.send(flags=final)
"""


@pytest.fixture(scope="module")
def puppet(tmp_path_factory: pytest.TempPathFactory, launch: Launch) -> Server:
    """A server whose engine does as it is told; two instances of the router."""
    opened = synthetic_repository(tmp_path_factory.mktemp("puppet") / "repo", cold=["pirate", "haiku"], streams=2)
    router = opened.root / "lora_router" / "config.pbtxt"
    for parameter, seconds in (("stall_timeout_seconds", "0.5"), ("first_answer_timeout_seconds", "1")):
        write_text(router, set_parameters(parse(read_text(router)), {parameter: seconds}).text)
    write_text(opened.root / "tensorrt_llm" / "1" / "model.py", PUPPET)
    return launch(opened.root)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """Six adapters and a cache for three."""
    names = [f"n{number}" for number in range(6)]
    return synthetic_repository(tmp_path_factory.mktemp("reload") / "repo", warm=names[:2], cold=names[2:], pages=3)


@pytest.fixture(scope="module")
def server(opened: Repository, launch: Launch) -> Server:
    """In explicit mode."""
    return launch(opened.root, extra=EXPLICIT)


def tell(server: Server, *what: int, **options: Any) -> Iterator[Tensors]:
    """The router's answers, row by row, when the engine is told this; `options` are those of the client."""
    question = Question([b"pirate"] * len(what), tokens=what)
    return grpc_stream(server, "lora_router", ROUTER.tensors(question, False), **options)


def test_what_belongs_to_a_request_reaches_the_engine(puppet: Server) -> None:
    """Its id, correlation id, timeout and parameters."""
    options = {"request_id": "mine", "sequence_id": 7, "timeout": 9_000_000, "parameters": {"a": 1, "b": "c"}}
    result = next(tell(puppet, TELL, **options))
    request_id, correlation_id, timeout, parameters, _ = json.loads(ROUTER.text(result))

    assert ("mine", 7, 9_000_000) == (request_id, correlation_id, timeout)
    assert {"a": 1, "b": "c"}.items() <= json.loads(parameters).items()


@pytest.mark.parametrize(
    "parameters",
    [
        {"lora_name": "pirate"},
        {"sampling_parameters": '{"temperature": 0.5, "lora_name": "pirate"}'},
        {"a": float("nan"), "request": '{"model": "pirate"}'},
    ],
)
def test_an_adapter_that_is_named_in_a_parameter_is_an_error(puppet: Server, parameters: dict[str, Any]) -> None:
    """Where other servers take it: the base model must not answer instead."""
    name = [*parameters][-1]
    with pytest.raises(InferenceServerException, match=f"{name}: not taken as a parameter; name the adapter with"):
        list(tell(puppet, TELL, parameters=parameters))


def test_a_trace_goes_on_in_the_engine(tmp_path: Path, launch: Launch) -> None:
    """The engine's part is a child of the router's."""
    opened = synthetic_repository(tmp_path / "repo", cold=["pirate"], streams=1)
    settings = (f"triton,file={tmp_path / 'trace'}", "triton,log-frequency=1", "rate=1", "level=TIMESTAMPS")
    server = launch(opened.root, extra=[word for setting in settings for word in ("--trace-config", setting)])
    assert expected(read_table(opened), "pirate") == ask(server, "pirate")
    server.stop()  # the trace is written
    traced = json.loads((tmp_path / "trace.0").read_text())
    parts = {part["model_name"]: part for part in traced if "model_name" in part}

    assert parts["lora_router"]["id"] == parts["tensorrt_llm"]["parent_id"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (SILENCE, "the engine's model sent no response"),
        (RAISE, "LoRA adapter 'pirate': .*the engine is out of its mind"),
    ],
)
def test_an_engine_that_fails_is_an_error_each_time(puppet: Server, what: int, message: str) -> None:
    """More often than the router has instances, so that none of them is lost; no traceback, no path."""
    for _ in range(5):
        with pytest.raises(InferenceServerException, match=message) as raised:
            list(tell(puppet, what))

        assert not re.search(r"File |/model\.py|Traceback", str(raised.value))


def test_a_row_without_an_answer_is_an_error(puppet: Server) -> None:
    """Although another row of the batch has one."""
    answers = tell(puppet, TELL, SILENCE)

    assert 0 == next(answers)["batch_index"].item()
    with pytest.raises(InferenceServerException, match="the engine's model sent no response"):
        next(answers)


@pytest.mark.parametrize("what", [BREAK, BREAK_AND_END])
def test_an_engine_that_breaks_in_mid_stream_ends_the_stream(puppet: Server, what: int) -> None:
    """After what it has said, and more often than the router has instances.

    Triton 2.51 loses an error that is not the first answer to a BLS request, and, where these come together, the end of
    the stream.
    """

    def pieces() -> Iterator[bytes]:
        with contextlib.suppress(InferenceServerException):
            for result in tell(puppet, what):
                yield ROUTER.text(result)

    assert [[b"half"]] * 3 == [list(pieces()) for _ in range(3)]


def test_an_engine_that_falls_silent_in_mid_stream_is_an_error(puppet: Server) -> None:
    """And counted as such; the instance that waited goes on with the next request."""
    with pytest.raises(InferenceServerException, match=r"^the engine's model has sent nothing for [0-9.]+ s$"):
        list(tell(puppet, BREAK_AND_END))

    await_sample(puppet, "lora_requests_total", bool, lora_name="pirate", outcome="UNAVAILABLE")
    await_sample(puppet, "lora_requests_running", lambda running: running == 0, lora_name="pirate")
    assert [1, 1, 1] == [len(list(tell(puppet, TELL))) for _ in range(3)]


def test_an_engine_that_goes_on_after_its_pause_is_heard_by_nobody(puppet: Server) -> None:
    """Who asks Triton about the client of a request that has been answered takes the server down."""
    answers = tell(puppet, PAUSE)

    assert b"half" == ROUTER.text(next(answers))
    with pytest.raises(InferenceServerException, match=r"^the engine's model has sent nothing for"):
        next(answers)
    deadline = time.monotonic() + 30
    while not json.loads(ROUTER.text(next(tell(puppet, TELL))))[-1]:  # the engine is still at it
        assert time.monotonic() < deadline
    assert [1, 1, 1] == [len(list(tell(puppet, TELL))) for _ in range(3)]


def test_a_load_that_the_engine_never_answers_keeps_nobody_from_the_adapter(puppet: Server) -> None:
    """The request is left behind with all that it had taken; the next one loads the adapter."""
    question = Question([b"haiku"], tokens=[NEVER])
    with pytest.raises(InferenceServerException, match=r"^the engine's model has sent nothing for"):
        list(grpc_stream(puppet, "lora_router", ROUTER.tensors(question, False)))

    question = Question([b"haiku"], tokens=[TELL])
    for _ in range(3):
        assert 1 == len(list(grpc_stream(puppet, "lora_router", ROUTER.tensors(question, False))))


def test_parameters_that_triton_cannot_carry_to_the_engine_are_left_out(puppet: Server) -> None:
    """Of a misspelt input, for instance: the engine, asked directly, does not mind it."""
    connection = http.client.HTTPConnection(puppet.http_url, timeout=60)
    body = {"input_ids": [1], "input_lengths": 1, "request_output_len": TELL, "lora_name": "pirate"}
    with contextlib.closing(connection):
        connection.request(
            "POST",
            "/v2/models/lora_router/generate",
            json.dumps(body | {"temprature": 1.5, "huge": (1 << 64) - 1, "note": "x"}),
        )
        answer = json.loads(connection.getresponse().read())
    seen = json.loads(bytes(answer["output_ids"]))

    assert {"note": "x"} == {key: value for key, value in json.loads(seen[3]).items() if key != "huge"}


def test_an_engine_whose_process_is_killed_is_an_error(tmp_path: Path, launch: Launch) -> None:
    """For the request that it was about to answer, for the one that it was answering, and for those that come."""
    opened = synthetic_repository(
        tmp_path / "repo", cold=["pirate"], streams=2, parameters={"synthetic_token_seconds": "0.1"}
    )
    router = opened.root / "lora_router" / "config.pbtxt"
    for parameter in ("first_answer_timeout_seconds", "stall_timeout_seconds"):
        write_text(router, set_parameters(parse(read_text(router)), {parameter: "2"}).text)
    server = launch(opened.root)
    streamed, whole = (ROUTER.tensors(Question([b"pirate"], tokens=[100]), streams) for streams in (True, False))
    with ThreadPoolExecutor(1) as pool:
        answered = grpc_stream(server, ROUTER.model, streamed)
        next(answered)
        unanswered = pool.submit(lambda: list(grpc_stream(server, ROUTER.model, whole)))
        await_sample(server, "lora_requests_running", lambda running: running == 2, lora_name="pirate")
        [engine] = processes_of(server.pid)["tensorrt_llm"]
        os.kill(engine, signal.SIGKILL)
        rests: list[Callable[[], object]] = [lambda: list(answered), unanswered.result]
        for rest in rests:
            with pytest.raises(InferenceServerException, match="has sent nothing for|not healthy"):
                rest()
    with pytest.raises(InferenceServerException, match="LoRA adapter 'pirate': .*not healthy"):
        list(tell(server, 1))


def test_a_model_that_is_unloaded_is_unavailable_until_it_is_back(server: Server, opened: Repository) -> None:
    """And its adapters are loaded again, without a client noticing."""
    table = read_table(opened)
    names = list(table.entries)
    assert [expected(table, name) for name in names] == [ask(server, name) for name in names]
    control(server, "unload")
    with pytest.raises(ServerError, match="LoRA adapter 'n1': .*not ready"):
        ask(server, "n1")
    await_sample(server, "lora_requests_total", lambda n: n == 1, lora_name="n1", outcome="UNAVAILABLE")
    control(server, "load")

    assert [expected(table, name) for name in names] == [ask(server, name) for name in names]


@pytest.mark.parametrize("model", ["tensorrt_llm", "lora_router"])
def test_a_model_is_reloaded_under_load(server: Server, opened: Repository, model: str) -> None:
    """An answer is right; without one the client is told that the model is not there; and then it is there again."""
    table = read_table(opened)
    names = list(table.entries)
    stop = threading.Event()
    wrong: list[str] = []
    outcomes: Counter[str] = Counter()

    def keep_asking(number: int) -> None:
        while not stop.is_set():
            name = names[number % len(names)]
            number += 1
            try:
                answer = ask(server, name)
            except ServerError as error:
                outcomes["not there" if NOT_THERE.search(str(error)) else str(error)] += 1
            else:
                outcomes["answered"] += 1
                wrong.extend([answer] if answer != expected(table, name) else [])

    with ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(keep_asking, number) for number in range(6)]
        for _ in range(2):
            control(server, "load", model)
        stop.set()
        for future in asking:
            future.result(timeout=60)

    assert [] == wrong
    assert {"answered"} <= set(outcomes) <= {"answered", "not there"}
    assert [expected(table, name) for name in names] == [ask(server, name) for name in names]


def test_the_listing_is_reloaded_in_place(server: Server, opened: Repository) -> None:
    """Its metrics are Triton's: those of the older instance must be gone before the newer one has any."""
    config = opened.root / "lora_adapters" / "config.pbtxt"
    names = list(read_table(opened).entries)
    stop = threading.Event()

    def keep_asking() -> None:
        for name in itertools.cycle(names):
            if stop.is_set():
                return
            ask(server, name)

    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(keep_asking) for _ in range(2)]
        try:
            count = 0.0
            for _ in range(10):
                write_text(config, read_text(config) + "\n")
                control(server, "load", "lora_adapters")
                more = functools.partial(operator.lt, count)
                count = await_sample(server, "lora_requests_total", more, lora_name="n1", outcome="OK")
        finally:
            stop.set()
        for future in asking:
            future.result(timeout=60)

    assert expected(read_table(opened), "n1") == ask(server, "n1")


NOT_THERE = re.compile(r"not ready|not found|no available versions|unloaded|unavailable", re.IGNORECASE)


def test_a_config_that_is_reloaded_counts(server: Server, opened: Repository) -> None:
    """The router reads its parameters when it is loaded."""
    path = opened.root / "lora_router" / "config.pbtxt"
    before = read_text(path)
    write_text(path, before.replace('"tensorrt_llm"', '"no_such_engine"'))
    try:
        control(server, "load", "lora_router")
        with pytest.raises(ServerError, match="no_such_engine"):
            ask(server, "n1")
    finally:
        write_text(path, before)
        control(server, "load", "lora_router")

    assert expected(read_table(opened), "n1") == ask(server, "n1")
