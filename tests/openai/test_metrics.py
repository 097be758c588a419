# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The metrics of a door, as Prometheus' own parser reads them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from scripted_triton import BEFORE_SILENCE, opened

Samples = dict[tuple[str, ...], float]
BODY: dict[str, Any] = {"model": "pirate", "prompt": "abc", "max_tokens": 5}
LABELS = ("model", "endpoint", "status")
COMPLETIONS = "/v1/completions"


def samples(text: str) -> Samples:
    """(name without the prefix, model, endpoint and status as far as it has these labels) -> value."""
    return {
        (
            one.name.removeprefix("tritonlora_openai_"),
            *(one.labels[name] for name in LABELS if name in one.labels),
        ): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
        if not one.name.endswith("_bucket")
    }


async def scrape(client: httpx.AsyncClient) -> Samples:
    """What the door says of itself."""
    return samples((await client.get("/metrics")).text)


def test_requests_and_their_tokens_are_counted_by_model() -> None:
    """By the name that the client sent; made-up names share one label, whatever the error is."""

    async def asked() -> Samples:
        async with opened() as (_, client):
            for body in (
                {"stream": True}, {"n": 2}, {"model": "arr"}, {"model": "base/tensorrt_llm"}, {"max_tokens": 5000},
                {"model": "nobody"}, {"model": "nobody2", "stream": True}, {"model": "no/body"}, {"max_tokens": "5"},
                {"model": "nobody3", "max_tokens": 5000},
            ):  # fmt: skip
                await client.post(COMPLETIONS, json={**BODY, **body})
            await client.get("/v1/models/pirate")
            await client.get("/elsewhere")
            return await scrape(client)

    found = asyncio.run(asked())
    requests = {labels[1:]: value for labels, value in found.items() if labels[0] == "requests_total"}

    assert {
        ("pirate", COMPLETIONS, "200"): 2,
        ("arr", COMPLETIONS, "200"): 1,
        ("base/tensorrt_llm", COMPLETIONS, "200"): 1,
        ("pirate", COMPLETIONS, "400"): 1,
        ("(unknown)", COMPLETIONS, "404"): 4,
        ("(unknown)", COMPLETIONS, "400"): 1,
        ("(unknown)", "/v1/models", "200"): 1,
        ("(unknown)", "other", "404"): 1,
    } == requests
    assert (6, 15) == (found["prompt_tokens_total", "pirate"], found["generated_tokens_total", "pirate"])
    assert (3, 5) == (found["prompt_tokens_total", "arr"], found["generated_tokens_total", "arr"])
    assert (4, 10) == tuple(
        found[f"{name}_count", COMPLETIONS] for name in ("time_to_first_token_seconds", "request_seconds")
    )
    assert 0 == found["requests_in_flight",]
    assert not [labels for labels in found if "nobody" in str(labels)]


def test_stalls_and_clients_that_leave_are_counted() -> None:
    """A stream that fails after its start counts with the status of its error."""

    async def asked() -> tuple[Samples, Samples]:
        silent = {**BODY, "prompt": "x!"}
        slow = {**BODY, "prompt": "x~", "max_tokens": 900, "stream": True}
        async with opened(stall_seconds=0.2) as (_, client):
            for is_streamed in (True, False):
                await client.post(COMPLETIONS, json={**silent, "stream": is_streamed})
            stalled = await scrape(client)
        async with opened() as (_, client):
            async with client.stream("POST", COMPLETIONS, json=slow) as response:
                await anext(response.aiter_raw())
                assert 1 == (await scrape(client))["requests_in_flight",]
            while (left := await scrape(client))["requests_in_flight",]:
                pass
            return stalled, left

    stalled, left = asyncio.run(asked())

    assert 2 == stalled["stalls_total", "pirate"] == stalled["requests_total", "pirate", COMPLETIONS, "504"]
    assert 2 * BEFORE_SILENCE == stalled["generated_tokens_total", "pirate"]
    assert 1 == left["disconnects_total", "pirate"] == left["requests_total", "pirate", COMPLETIONS, "200"]


WORKER = """
import os, sys
from tritonlora.openai.metrics import Metrics
metrics = Metrics()
scope = {"path": "/v1/completions"}
if sys.argv[1] == "ask":
    with metrics.recorded(scope) as record:
        record.model, record.status = "pirate", 200
        record.responded()
    with metrics.recorded(scope):
        os._exit(0)
else:
    sys.stdout.buffer.write(metrics.page())
"""


def test_one_worker_tells_the_metrics_of_all(tmp_path: Path) -> None:
    """The requests under way of a worker that has ended are not."""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", WORKER, "ask"], env=environment, check=True)
    page = subprocess.run(
        [sys.executable, "-c", WORKER, "tell"], env=environment, check=True, capture_output=True, text=True
    ).stdout

    found = samples(page)
    assert 2 == found["requests_total", "pirate", COMPLETIONS, "200"] == found["request_seconds_count", COMPLETIONS]
    assert 0 == found.get(("requests_in_flight",), 0)
