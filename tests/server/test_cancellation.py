# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Clients of the router that cancel, or whose time is up, on a real tritonserver.

Triton 2.51 can say that they have left, and cannot cancel what the router has asked of the engine, which is asked to
stop instead. For later versions see tests/test_router_model.py.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import queue
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from asking import ROUTER, Question, Tensors, Way, grpc_inputs, grpc_stream, tokens_in, tokens_out
from repositories import synthetic_repository
from synthetic import await_sample, expected, samples
from tritonlora.launch.server import Server
from tritonlora.repository.paths import Repository, read_table

LONG = 400  # tokens, 10 ms each
SHORT = 50
ENDLESS = 1_000_000


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """Adapters for a slow engine whose cache holds one, and two instances of the router."""
    root = tmp_path_factory.mktemp("cancellation") / "repo"
    slow = {"synthetic_token_seconds": "0.01"}
    return synthetic_repository(root, cold=["long", "waits", "short", "endless"], pages=1, streams=2, parameters=slow)


@pytest.fixture(scope="module")
def server(opened: Repository, launch: Callable[..., Server]) -> Server:
    """A server on it."""
    return launch(opened.root)


def question(name: str, tokens: int) -> Tensors:
    """The inputs of the router for a streamed answer."""
    return tokens_in(Question([name.encode()], tokens=[tokens]), streams=True)


def answer(server: Server, name: str | None) -> tuple[str, ...] | object:
    """The router's, of 12 tokens."""
    return Way("grpc_stream", ROUTER, streams=True).ask(server, Question(None if name is None else [name.encode()]))


Results = queue.Queue[tuple[Any, InferenceServerException | None]]


@contextlib.contextmanager
def asking(
    server: Server, name: str, tokens: int, seconds: float | None = None, request_id: str = ""
) -> Iterator[Results]:
    """A streamed request to the router, which is cancelled on leaving; its client waits that many seconds at most."""
    results: Results = queue.Queue()
    with grpc.InferenceServerClient(server.grpc_url) as connection:
        connection.start_stream(lambda result, error: results.put((result, error)), stream_timeout=seconds)
        connection.async_stream_infer("lora_router", grpc_inputs(question(name, tokens)), request_id=request_id)
        yield results
        connection.stop_stream(cancel_requests=True)


def leave(server: Server, name: str, tokens: int, count: int) -> None:
    """Go away after the first answer, and return when so many clients of the adapter are counted that did."""
    with asking(server, name, tokens) as results:
        assert results.get(timeout=30)[1] is None
    is_counted = functools.partial(operator.eq, count)
    await_sample(server, "lora_requests_total", is_counted, lora_name=name, outcome="CANCELLED")


def test_a_stream_that_is_cancelled_is_counted_and_the_next_request_answered(
    server: Server, opened: Repository
) -> None:
    """By the right adapter, as if nothing had been."""
    for count in (1, 2, 3):
        leave(server, "short", SHORT, count)

    assert (expected(read_table(opened), "short", tokens=12),) == answer(server, "short")
    await_sample(server, "lora_requests_running", lambda n: n == 0, lora_name="short")


def test_a_client_that_leaves_frees_its_instances_and_its_room_in_the_engine(
    server: Server, opened: Repository
) -> None:
    """Both instances are taken in turn, and the only page of the cache, by what would go on for hours."""
    for count in (1, 2, 3):
        leave(server, "endless", ENDLESS, count)

        assert (expected(read_table(opened), "short", tokens=12),) == answer(server, "short")


def test_a_client_that_leaves_stops_no_other_request_of_the_same_id(server: Server, opened: Repository) -> None:
    """Ids are the clients' own, and nobody keeps two of them from choosing the same."""
    stays = grpc_stream(server, "lora_router", question("long", LONG // 2), request_id="same")
    text = tokens_out(next(stays))
    with asking(server, "long", LONG // 2, request_id="same") as results:
        assert results.get(timeout=30)[1] is None
    text += b"".join(map(tokens_out, stays))

    assert expected(read_table(opened), "long", tokens=LONG // 2) == text.decode()


def test_a_deadline_that_passes_is_a_cancellation(server: Server) -> None:
    """The client's own, which gRPC tells the server."""
    before = samples(server).get(CANCELLED_LONG, 0.0)
    with asking(server, "long", LONG // 2, seconds=0.5) as results:
        last = None
        while last is None:
            last = results.get(timeout=30)[1]

    assert "StatusCode.DEADLINE_EXCEEDED" == last.status()
    await_sample(server, "lora_requests_total", lambda n: n == before + 1, lora_name="long", outcome="CANCELLED")


CANCELLED_LONG = ("lora_requests_total", (("lora_name", "long"), ("outcome", "CANCELLED")))


def test_a_client_that_leaves_while_it_waits_for_room_frees_its_instance(server: Server, opened: Repository) -> None:
    """At once: the other instance is busy, and another request is answered before that one has ended."""
    running = grpc_stream(server, "lora_router", question("long", LONG))
    text = tokens_out(next(running))  # has the only page of the cache
    with asking(server, "waits", SHORT):
        await_sample(server, "lora_requests_running", lambda n: n == 1, lora_name="waits")
    await_sample(server, "lora_requests_total", lambda n: n == 1, lora_name="waits", outcome="CANCELLED")

    assert (expected(read_table(opened), None, tokens=12),) == answer(server, None)
    assert 1 == samples(server)[("lora_requests_running", (("lora_name", "long"),))]
    text += b"".join(map(tokens_out, running))

    assert expected(read_table(opened), "long", tokens=LONG) == text.decode()
