# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Clients that leave, engines that fail, and what the router's metrics say, on a real tritonserver."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc
from prometheus_client.parser import text_string_to_metric_families
from test_router import ask, engine_inputs, expected, stream
from tritonclient.utils import InferenceServerException

from repositories import synthetic_repository
from tritonlora.errors import ServerError
from tritonlora.repository import Repository, read_table
from tritonlora.server import Server

Launch = Callable[..., Server]
EXPLICIT = ("--model-control-mode=explicit", "--load-model=*")
PATIENCE = 20.0

# An engine that does as it is told by request_output_len.
TOLD, SILENT, RAISE = 1, 2, 3
PUPPET = """
import json
import numpy as np
import triton_python_backend_utils as pb_utils


def answer(text):
    ids = np.array([[list(text.encode())]], np.int32)
    lengths = np.array([[ids.size]], np.int32)
    return pb_utils.InferenceResponse([pb_utils.Tensor("output_ids", ids), pb_utils.Tensor("sequence_length", lengths)])


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            told = pb_utils.get_input_tensor_by_name(request, "request_output_len").as_numpy().item()
            if told == 3:
                raise ValueError("the engine is out of its mind")
            if told == 1:
                seen = [request.request_id(), request.correlation_id(), request.timeout(), request.parameters()]
                sender.send(answer(json.dumps(seen)))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


def request_inputs(name: bytes | None, tokens: int, streaming: bool = False) -> list[Any]:
    """gRPC inputs of the router, for an answer of `tokens` tokens."""
    inputs = [tensor for tensor in engine_inputs(None if name is None else [name]) if "output_len" not in tensor.name()]
    length = grpc.InferInput("request_output_len", [1, 1], "INT32")
    length.set_data_from_numpy(np.array([[tokens]], np.int32))
    inputs.append(length)
    if streaming:
        wanted = grpc.InferInput("streaming", [1, 1], "BOOL")
        wanted.set_data_from_numpy(np.array([[True]]))
        inputs.append(wanted)
    return inputs


def scrape(server: Server) -> dict[tuple[str, ...], float]:
    """The router's samples: (name, label values in the order of the labels' names) -> value."""
    connection = http.client.HTTPConnection(server.metrics_url, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("lora_")
    }


def until(holds: Callable[[], bool]) -> None:
    """Return as soon as it holds."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def control(server: Server, verb: str) -> None:
    """Load or unload the engine's model."""
    connection = http.client.HTTPConnection(server.http_url, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", f"/v2/repository/models/tensorrt_llm/{verb}", "{}")
        assert connection.getresponse().status == 200


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """An engine of 25 tokens a second, with room for one adapter."""
    root = tmp_path_factory.mktemp("faults") / "repo"
    slow = {"synthetic_token_seconds": "0.04"}
    return synthetic_repository(root, warm=["pirate"], cold=["cold"], pages=1, parameters=slow)


@pytest.fixture(scope="module")
def server(opened: Repository, launch: Launch) -> Server:
    """In explicit mode."""
    return launch(opened.root, extra=EXPLICIT)


@pytest.fixture(scope="module")
def puppet(tmp_path_factory: pytest.TempPathFactory, launch: Launch) -> Server:
    """A server whose engine does as it is told."""
    opened = synthetic_repository(tmp_path_factory.mktemp("puppet") / "repo", warm=["pirate"])
    config = opened.config_path.read_text()
    opened.config_path.write_text(re.sub(r"(?s)# >>>.*?# <<<[^\n]*\n|model_warmup \[.*?\n\]\n", "", config))
    (opened.root / "tensorrt_llm" / "1" / "model.py").write_text(PUPPET)
    return launch(opened.root)


# Clients that leave


@pytest.mark.parametrize("streaming", [False, True])
def test_a_client_that_leaves_frees_the_router_and_the_engine(
    server: Server, opened: Repository, streaming: bool
) -> None:
    """Its adapter holds the only place in the engine's cache, which another one gets long before the answer's end."""
    cancelled = ("lora_router_requests_total", "pirate", "cancelled")
    before = scrape(server).get(cancelled, 0)
    ask(server, "pirate", tokens=1)
    with grpc.InferenceServerClient(server.grpc_url) as connection:
        connection.start_stream(callback=lambda result, error: None)
        connection.async_stream_infer("lora_router", request_inputs(b"pirate", 4000, streaming))
        until(lambda: scrape(server)["lora_router_requests_in_flight", "pirate"] == 1)
        connection.stop_stream(cancel_requests=True)
    started = time.monotonic()

    assert expected(read_table(opened), "cold", tokens=3) == ask(server, "cold", tokens=3)
    assert time.monotonic() - started < PATIENCE
    until(lambda: scrape(server).get(cancelled, 0) == before + 1)
    assert scrape(server)["lora_router_requests_in_flight", "pirate"] == 0


def test_what_belongs_to_a_request_reaches_the_engine(puppet: Server) -> None:
    """Its id, correlation id, timeout and parameters."""
    options = {"request_id": "mine", "sequence_id": 7, "timeout": 9_000_000, "parameters": {"a": 1, "b": "c"}}
    result = next(stream(puppet, "lora_router", request_inputs(b"pirate", TOLD), **options))
    request_id, correlation_id, timeout, parameters = json.loads(
        bytes(result.as_numpy("output_ids").reshape(-1).tolist())
    )

    assert ("mine", 7, 9_000_000) == (request_id, correlation_id, timeout)
    assert {"a": 1, "b": "c"}.items() <= json.loads(parameters).items()


def test_a_request_without_an_id_gets_one(puppet: Server) -> None:
    """By which it can be stopped."""
    ids = []
    for _ in range(2):
        result = next(stream(puppet, "lora_router", request_inputs(None, TOLD)))
        ids.append(json.loads(bytes(result.as_numpy("output_ids").reshape(-1).tolist()))[0])

    assert all(one.isdecimal() for one in ids)
    assert ids[0] != ids[1]


# Engines that fail


def test_an_engine_that_answers_nothing_ends_the_request(puppet: Server) -> None:
    """With nothing."""
    assert [] == list(stream(puppet, "lora_router", request_inputs(b"pirate", SILENT)))


def test_an_engine_that_raises_is_an_error_without_a_traceback(puppet: Server) -> None:
    """Its own words."""
    with pytest.raises(InferenceServerException, match="the engine is out of its mind") as raised:
        list(stream(puppet, "lora_router", request_inputs(b"pirate", RAISE)))

    assert not re.search(r"File |/model\.py|Traceback", str(raised.value))


def test_a_model_that_is_unloaded_is_unavailable_until_it_is_back(server: Server, opened: Repository) -> None:
    """And its adapters are loaded again."""
    assert expected(read_table(opened), "cold", tokens=3) == ask(server, "cold", tokens=3)
    control(server, "unload")
    with pytest.raises(ServerError, match="LoRA adapter 'cold': .*is not ready"):
        ask(server, "cold")
    until(lambda: scrape(server).get(("lora_router_requests_total", "cold", "UNAVAILABLE"), 0) == 1)
    control(server, "load")

    assert expected(read_table(opened), "cold", tokens=3) == ask(server, "cold", tokens=3)


def test_metrics_say_who_runs_and_who_waits(server: Server, opened: Repository) -> None:
    """In the form of the Gateway API Inference Extension: one series, its value the time."""
    with grpc.InferenceServerClient(server.grpc_url) as connection:
        connection.start_stream(callback=lambda result, error: None)
        connection.async_stream_infer("lora_router", request_inputs(b"pirate", 4000, streaming=True))

        def info() -> list[tuple[tuple[str, ...], float]]:
            return [(key[1:], value) for key, value in scrape(server).items() if key[0] == "lora_requests_info"]

        until(lambda: [key for key, _ in info()] == [("2", "pirate", "")])
        connection.async_stream_infer("lora_router", request_inputs(b"cold", 3, streaming=True))
        until(lambda: [key for key, _ in info()] == [("2", "pirate", "cold")])
        assert abs(info()[0][1] - time.time()) < 5
        connection.stop_stream(cancel_requests=True)
    until(lambda: [key for key, _ in info()] == [("2", "", "")])


def test_names_that_nobody_registered_do_not_become_labels(server: Server) -> None:
    """A client cannot make the metrics grow."""
    for name in ("nobody", "noone", ""):
        with pytest.raises(ServerError):
            ask(server, name)
    labels = {key[1] for key in scrape(server) if key[0].startswith("lora_router_requests")}

    assert labels <= {"(base)", "(unknown)", "pirate", "cold"}


def test_requests_of_an_engine_that_is_killed_are_answered(opened: Repository, launch: Launch) -> None:
    """UNAVAILABLE after some seconds of silence; once the model is loaded again all is as before."""
    server = launch(opened.root, extra=EXPLICIT)
    answers = stream(server, "lora_router", request_inputs(b"pirate", 4000, streaming=True))
    next(answers)
    stubs = subprocess.run(
        ["pgrep", "-P", str(server.pid), "-f", "tensorrt_llm_0_0"], check=True, stdout=subprocess.PIPE, text=True
    )
    os.kill(int(stubs.stdout.split()[0]), signal.SIGKILL)

    with pytest.raises(InferenceServerException, match="the engine's model stopped before it had answered"):
        list(answers)

    control(server, "unload")
    control(server, "load")
    assert expected(read_table(opened), "pirate", tokens=3) == ask(server, "pirate", tokens=3)
