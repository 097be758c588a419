# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Many adapters through a small cache, many requests at a time, on a real tritonserver."""

from __future__ import annotations

import http.client
import json
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from repositories import synthetic_repository
from tritonlora import wiring
from tritonlora.adapters import AdapterTable, render, with_adapter
from tritonlora.files import write_text
from tritonlora.repository import Repository, read_table, read_text
from tritonlora.server import Server

ADAPTERS = 200
PAGES = 8
STREAMS = 32
REQUESTS = 750
TOKENS = 8

Launch = Callable[..., Server]


def many_adapters(root: Path, *, cache_pages: int) -> Repository:
    """A repository with ADAPTERS cold adapters of one page each. They share their files; answers tell them apart."""
    opened = synthetic_repository(root, cold=["n1"], pages=PAGES)
    first = read_table(opened).entries["n1"]
    table = AdapterTable()
    for number in range(1, ADAPTERS + 1):
        table = with_adapter(table, f"n{number}", replace(first, lora_task_id=number))
    write_text(opened.table_path, render(table))
    config = opened.root / "lora_router" / "config.pbtxt"
    write_text(config, wiring.set_parameter(read_text(config), "cache_pages", str(cache_pages)))
    return opened


def texts(server: Server, names: Sequence[str], streams: int = STREAMS) -> list[Any]:
    """The answers, asked for over `streams` connections."""
    local = threading.local()
    connections: list[http.client.HTTPConnection] = []

    def one(name: str) -> Any:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection(server.http_url, timeout=60)
            connections.append(local.connection)
        body = {"text_input": "x", "max_tokens": TOKENS, "lora_name": name}
        local.connection.request("POST", "/v2/models/ensemble/generate", json.dumps(body))
        answer = json.loads(local.connection.getresponse().read())
        return answer.get("text_output", answer)

    try:
        with ThreadPoolExecutor(streams) as pool:
            return list(pool.map(one, names))
    finally:
        for connection in connections:
            connection.close()


@pytest.mark.parametrize("cache_pages", [0, PAGES])
def test_two_hundred_adapters_share_a_cache_of_eight(tmp_path: Path, launch: Launch, cache_pages: int) -> None:
    """In random and in cyclic order, whether the router knows the cache's size or not: no error, no wrong adapter."""
    server = launch(many_adapters(tmp_path / "repo", cache_pages=cache_pages).root)
    cyclic = [f"n{1 + number % ADAPTERS}" for number in range(REQUESTS // 2)]
    names = [*cyclic, *random.Random(0).choices(cyclic, k=REQUESTS // 2)]  # noqa: S311

    assert [(f"[{name[1:]}]x" * TOKENS)[:TOKENS] for name in names] == texts(server, names)
