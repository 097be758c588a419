# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Many adapters through a small cache, many requests at a time, on a real tritonserver."""

from __future__ import annotations

import functools
import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from repositories import register_copies, synthetic_repository
from synthetic import samples
from tritonlora.bench import scratch
from tritonlora.bench.processes import processes_of
from tritonlora.cli.commands import main
from tritonlora.launch import client
from tritonlora.launch.server import Server
from tritonlora.repository.paths import ROUTER, Repository, read_table
from tritonlora.top.look import look
from tritonlora.top.view import view_of

ADAPTERS = 200
PAGES = 8
STREAMS = 32
REQUESTS = 500
TOKENS = 8

Launch = Callable[..., Server]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, launch: Launch) -> Server:
    """A server of 200 cold adapters with a cache for 8, and more streams than that."""
    return launch(many_adapters(tmp_path_factory.mktemp("load") / "repo").root)


def many_adapters(root: Path) -> Repository:
    """A repository with ADAPTERS cold adapters of one page each. They share their files; answers tell them apart."""
    opened = synthetic_repository(root, cold=["n1"], pages=PAGES, streams=12)
    register_copies(opened, [f"n{number}" for number in range(2, ADAPTERS + 1)])
    return opened


def expected(name: str) -> str:
    """What the synthetic engine answers: the task id, which is in the name, over and over."""
    return (f"[{name[1:]}]x" * TOKENS)[:TOKENS]


def texts(server: Server, names: Sequence[str], leaves: Callable[[int], bool] = lambda _: False) -> list[Any]:
    """The answers, asked for over STREAMS connections. A client that `leaves` does so in mid-stream: ""."""
    local = threading.local()
    connections: list[http.client.HTTPConnection] = []

    def connection() -> http.client.HTTPConnection:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection(server.http_url, timeout=60)
            connections.append(local.connection)
        found: http.client.HTTPConnection = local.connection
        return found

    def one(number: int, name: str) -> Any:
        body = {"text_input": "x", "max_tokens": TOKENS, "lora_name": name, "stream": leaves(number)}
        if leaves(number):
            connection().request("POST", "/v2/models/ensemble/generate_stream", json.dumps(body | {"max_tokens": 100}))
            connection().getresponse().read(20)
            connection().close()
            return ""
        connection().request("POST", "/v2/models/ensemble/generate", json.dumps(body))
        answer = json.loads(connection().getresponse().read())
        return answer.get("text_output", answer)

    try:
        with ThreadPoolExecutor(STREAMS) as pool:
            return list(pool.map(one, range(len(names)), names))
    finally:
        for opened in connections:
            opened.close()


def test_two_hundred_adapters_share_a_cache_of_eight(server: Server) -> None:
    """In random and in cyclic order: no error, no wrong adapter."""
    cyclic = [f"n{1 + number % ADAPTERS}" for number in range(REQUESTS // 2)]
    names = [*cyclic, *random.Random(0).choices(cyclic, k=REQUESTS // 2)]  # noqa: S311

    assert [expected(name) for name in names] == texts(server, names)


def test_clients_that_leave_do_not_disturb_the_others(server: Server) -> None:
    """Every sixth one closes its connection in the middle of a stream."""
    names = [f"n{1 + number % 20}" for number in range(REQUESTS // 2)]
    answers = texts(server, names, leaves=lambda number: number % 6 == 5)

    assert ["" if number % 6 == 5 else expected(name) for number, name in enumerate(names)] == answers


def test_top_shows_what_each_adapter_was_asked_for(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """While it is asked, and to the request: the counts are those of the clients."""
    names = [f"n{101 + number * number % 50}" for number in range(REQUESTS // 5)]  # not asked for just before
    port = server.metrics_url.rpartition(":")[2]
    take = functools.partial(look, server.http_url, f"http://{server.metrics_url}/metrics")
    before = take()
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(texts, server, names)
        code = main(["top", "--url", server.http_url, "--metrics-port", port, "--once", "--json", "--interval", "0.5"])
        found = json.loads(capsys.readouterr().out)

        assert [expected(name) for name in names] == answers.result()
    asked = Counter(names)
    deadline = time.monotonic() + 30
    while True:  # the resolver publishes twice a second
        now = take()
        seconds = now.seconds - before.seconds
        rates = {one.lora_name: one.requests_per_second or 0.0 for one in view_of(before, now).rows}
        gained = {name: round(seconds * rates[name]) for name in asked}
        if sum(gained.values()) >= len(names):
            break
        assert time.monotonic() < deadline
    loads = {one.lora_name: one.loads for one in view_of(None, now).rows}
    told = samples(server)

    assert (0, True, ADAPTERS) == (code, found["is_ready"], len(found["adapters"]))
    assert asked == gained
    for name in asked:
        series = [
            value for (metric, labels), value in told.items() if metric == "lora_loads_total" and labels[0][1] == name
        ]
        assert (sum(series), True) == (loads[name], sum(series) > 0)


def test_weights_that_were_sent_are_only_in_the_resolver_s_shared_memory(tmp_path: Path, launch: Launch) -> None:
    """Of a large adapter: memory of its own would be as much again, and in each instance of the router, many times."""
    opened = scratch.large_adapters(tmp_path / "repo", layers=4)
    server = launch(opened.root)
    nbytes = read_table(opened).entries["n1"].lora_weights_nbytes
    for number in range(2 * scratch.FEW_STREAMS * scratch.LARGE_ADAPTERS):
        name = f"n{1 + number % scratch.LARGE_ADAPTERS}"
        "".join(client.generate("x", lora_name=name, max_tokens=TOKENS, url=server.http_url))
    processes = processes_of(server.pid)
    router, [resolver] = ([memory_of(pid) for pid in processes[model]] for model in (ROUTER, "lora_resolver"))

    assert scratch.FEW_STREAMS == len(router)
    assert max(own + shared for own, shared in router) < nbytes
    own, shared = resolver
    assert 0.9 * nbytes < shared < 2.1 * nbytes
    assert own < nbytes


def memory_of(pid: int) -> tuple[int, int]:
    """Bytes of a process: its own, and shared ones."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    size = {line.split(":")[0]: line.split()[1:2] for line in lines}
    own, shared = (int(size[field][0]) * 1024 for field in ("RssAnon", "RssShmem"))
    return own, shared
