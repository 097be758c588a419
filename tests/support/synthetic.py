# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Asking a real tritonserver before the synthetic engine, whose response says which adapter gave it."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tritonclient.grpc as grpc
from prometheus_client.parser import text_string_to_metric_families

from tritonlora.launch import client
from tritonlora.launch.server import Server
from tritonlora.serving.adapter_table import AdapterTable

PROMPT = "hello"
EXPLICIT = ("--model-control-mode=explicit", "--load-model=*")


def expected(table: AdapterTable, lora_name: str | None, prompt: str = PROMPT, tokens: int = 24) -> str:
    """What the synthetic engine answers."""
    task = "base" if lora_name is None else str(table.entries[lora_name].lora_task_id)
    unit = f"[{task}]{prompt}".encode()
    return (unit * tokens)[:tokens].decode()


def ask(server: Server, lora_name: str | None, tokens: int = 24, **inputs: bytes) -> str:
    """A streamed answer over HTTP."""
    texts = {name: value.decode() for name, value in inputs.items()}
    url = server.http_url
    return "".join(client.generate(PROMPT, lora_name=lora_name, max_tokens=tokens, inputs=texts, url=url))


def post(server: Server, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Status and JSON of a POST."""
    connection = http.client.HTTPConnection(server.http_url, timeout=60)
    try:
        connection.request("POST", path, json.dumps(body))
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def listing(server: Server, lora_name: str | None = None) -> dict[str, Any]:
    """What the server says of its adapters."""
    inputs = []
    if lora_name is not None:
        inputs = [grpc.InferInput("lora_name", [1], "BYTES")]
        inputs[0].set_data_from_numpy(np.array([lora_name.encode()], np.object_))
    with grpc.InferenceServerClient(server.grpc_url) as connection:
        found: dict[str, Any] = json.loads(connection.infer("lora_adapters", inputs).as_numpy("adapters")[0])
    return found


def samples(server: Server) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """The lora_ metrics: (name, labels) -> value."""
    connection = http.client.HTTPConnection(server.metrics_url, timeout=30)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("lora_")
    }


def await_sample(server: Server, metric: str, condition: Callable[[float], bool], **labels: str) -> float:
    """Its value, once it is as it should be."""
    deadline = time.monotonic() + 30
    while True:
        value = samples(server).get((metric, tuple(sorted(labels.items()))), 0.0)
        if condition(value):
            return value
        assert time.monotonic() < deadline, (metric, labels, value)


def control(server: Server, verb: str, model: str = "tensorrt_llm") -> None:
    """Load or unload a model."""
    connection = http.client.HTTPConnection(server.http_url, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", f"/v2/repository/models/{model}/{verb}", "{}")
        assert connection.getresponse().status == 200
