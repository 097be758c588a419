# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Traces of the door, with OpenTelemetry's own exporter in memory."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from scripted_triton import opened
from tritonlora.openai import tracing

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
BODY: dict[str, Any] = {"model": "pirate", "prompt": "abc", "max_tokens": 5}


def spans_of(*asked: tuple[dict[str, str], dict[str, Any]]) -> tuple[list[Any], list[dict[str, str]]]:
    """The spans of requests, each with headers and fields, and the gRPC metadata that came with each."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    async def ask() -> list[dict[str, str]]:
        async with opened(tracing=tracing.Tracing(provider)) as (triton, client):
            for headers, fields in asked:
                await client.post("/v1/completions", json={**BODY, **fields}, headers=httpx.Headers(headers))
            return triton.metadata

    metadata = asyncio.run(ask())
    return list(exporter.get_finished_spans()), metadata


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_trace_goes_on_from_the_client_through_the_door_to_triton(is_streamed: bool) -> None:
    """With the adapter's name and its tokens."""
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=x"}
    [span], [metadata] = spans_of((headers, {"stream": is_streamed}))

    assert (int(TRACE, 16), int(PARENT, 16)) == (span.context.trace_id, span.parent.span_id)
    assert f"00-{TRACE}-{span.context.span_id:016x}-01" == metadata["traceparent"]
    assert "vendor=x" == metadata["tracestate"]
    assert {
        "gen_ai.request.model": "pirate",
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 5,
        "http.response.status_code": 200,
    }.items() <= span.attributes.items()


def test_a_request_without_a_trace_begins_one_and_a_failure_is_told() -> None:
    """An unknown model is the client's fault."""
    spans, metadata = spans_of(({}, {}), ({"traceparent": "junk"}, {"model": "nobody"}), ({}, {"temperature": "x"}))

    assert [None] * 3 == [span.parent for span in spans]
    assert [200, 404, 400] == [span.attributes["http.response.status_code"] for span in spans]
    assert "model_not_found" == spans[1].attributes["error.type"]
    assert [StatusCode.UNSET] * 3 == [span.status.status_code for span in spans]
    assert [f"{span.context.trace_id:032x}" for span in spans[:2]] == [one["traceparent"][3:35] for one in metadata]


def test_triton_gets_no_headers_without_traces() -> None:
    """Not the client's, either."""

    async def ask() -> dict[str, str]:
        async with opened() as (triton, client):
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            await client.post("/v1/completions", json=BODY, headers=headers)
            return triton.metadata[0]

    assert "traceparent" not in asyncio.run(ask())


@pytest.mark.parametrize(
    ("environment", "is_on"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_the_environment_says_whether_there_are_traces(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], is_on: bool
) -> None:
    """By OpenTelemetry's own variables."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = tracing.from_environment()
    if found is not None:
        found.close()

    assert is_on == (found is not None)
