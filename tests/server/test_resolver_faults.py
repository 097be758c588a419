# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""More adapters than the engine's cache has pages, and engines and models that come and go, past the router, on a real
tritonserver: the client sees time, and no error of the cache.
"""

from __future__ import annotations

import http.client
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from asking import ROUTER, Question, ways
from repositories import resolving
from synthetic import EXPLICIT, ask, control, expected, post
from tritonlora.bench.clients import Clients
from tritonlora.bench.clients import ask as let_ask
from tritonlora.files import write_text
from tritonlora.launch import client
from tritonlora.launch.server import Server
from tritonlora.pbtxt.text_format import parse
from tritonlora.repository import upkeep
from tritonlora.repository.model_configs import set_parameters
from tritonlora.repository.paths import Repository, read_table, read_text

Launch = Callable[..., Server]
COLD = tuple(f"cold{number}" for number in range(12))


def repository(directory: Path, *, pages: int, pace: float = 0.005, patience: float = 30) -> Repository:
    """Twelve adapters, none of them warm."""
    opened = resolving(directory / "repo", (), COLD, pages=pages)
    upkeep.set_parameters(opened, {"synthetic_token_seconds": str(pace)})
    set_resolver_parameter(opened, "cache_full_timeout_seconds", f"{patience:g}")
    return opened


def set_resolver_parameter(opened: Repository, name: str, value: str) -> None:
    """In its config.pbtxt."""
    path = opened.root / "lora_resolver" / "config.pbtxt"
    write_text(path, set_parameters(parse(read_text(path)), {name: value}).text)


def clients(opened: Repository, **options: object) -> Clients:
    """Of the ensemble, which takes text."""
    adapters = {name: entry.lora_task_id for name, entry in read_table(opened).entries.items()}
    return Clients("ensemble", adapters, is_text=True, discarded=0.0, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("pages", [1, 3, 8])
def test_no_error_of_the_cache_reaches_a_client(tmp_path: Path, launch: Launch, pages: int) -> None:
    """Whether the adapters in use fit or not; each answer is its adapter's."""
    opened = repository(tmp_path, pages=pages)
    server = launch(opened.root)
    for mix in ("uniform", "cyclic", "sticky"):
        outcome = let_ask(server.http_url, clients(opened, streams=12, tokens=12, mix=mix, seconds=2.0))

        assert ([], 0, 0) == (outcome.errors, outcome.failed, outcome.wrong)
        assert outcome.requests


def test_who_waits_for_too_long_is_told_so(tmp_path: Path, launch: Launch) -> None:
    """UNAVAILABLE, with the adapter's name; and then it is served."""
    opened = repository(tmp_path, pages=1, pace=0.05, patience=0.5)
    server, table = launch(opened.root), read_table(opened)
    busy = client.generate("hello", lora_name="cold0", max_tokens=60, url=server.http_url)
    first = next(busy)
    body = {"text_input": "hello", "max_tokens": 4, "lora_name": "cold1"}
    status, answer = post(server, "/v2/models/ensemble/generate", body)

    assert 400 == status
    wanted = "LoRA adapter 'cold1': it does not fit beside the adapters in use; waited 0.5 s; ask again"
    assert wanted in answer["error"]
    assert expected(table, "cold0", tokens=60) == first + "".join(busy)
    for _ in range(100):
        status, answer = post(server, "/v2/models/ensemble/generate", body)
        if status == http.client.OK:
            break
        assert wanted in answer["error"]
    assert expected(table, "cold1", tokens=4) == answer["text_output"]


@pytest.mark.parametrize("model", ["tensorrt_llm", "lora_resolver"])
def test_a_model_is_loaded_again_under_load(tmp_path: Path, launch: Launch, model: str) -> None:
    """Answers are right, some requests are refused, and then none is."""
    opened = repository(tmp_path, pages=8)
    server, table = launch(opened.root, extra=EXPLICIT), read_table(opened)
    asked = clients(opened, streams=6, tokens=12, seconds=6.0)
    again = threading.Timer(2.0, control, (server, "load", model))
    upkeep.set_parameters(opened, {"synthetic_token_seconds": "0.004"})  # without a change Triton loads nothing
    set_resolver_parameter(opened, "load_timeout_seconds", "60")
    again.start()
    outcome = let_ask(server.http_url, asked)
    again.join()

    assert 0 == outcome.wrong
    assert outcome.requests > outcome.failed
    for name in COLD:
        assert expected(table, name) == ask(server, name)
    after = let_ask(server.http_url, clients(opened, streams=6, tokens=12, seconds=2.0))
    assert ([], 0) == (after.errors, after.wrong)


def test_beside_the_router_weights_travel_with_every_request(tmp_path: Path, launch: Launch) -> None:
    """It loads adapters into the same engine, so that nothing is certain."""
    opened = repository(tmp_path, pages=8)
    server, table = launch(opened.root), read_table(opened)
    ends = threading.Event()

    def ask_the_router() -> int:
        count = 0
        for name in itertools.cycle(COLD):
            if ends.is_set():
                return count
            [found] = {way.ask(server, Question([name.encode()])) for way in ways([ROUTER], decoupled=True)[:1]}
            assert (expected(table, name, tokens=12),) == found
            count += 1
        return count

    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(ask_the_router)
        outcome = let_ask(server.http_url, clients(opened, streams=4, tokens=8, seconds=5.0))
        ends.set()

        assert beside.result() > 0
    assert ([], 0) == (outcome.errors, outcome.wrong)
