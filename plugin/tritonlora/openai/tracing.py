# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Traces of OpenTelemetry, where the environment names a receiver: a span for each request, with the adapter's name.

The span continues the client's trace, by W3C's headers, and Triton continues it, by the same headers as gRPC metadata.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from starlette.types import Scope

from tritonlora import extras
from tritonlora.openai.metrics import Record

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer, TracerProvider

log = logging.getLogger("tritonlora.openai")
_RECEIVERS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_SERVICE = "tritonlora-openai"
_CONTEXT = "tritonlora.trace"  # key of a request's scope: its headers for Triton


def headers_of(scope: Scope) -> Mapping[str, str]:
    """The headers by which Triton continues the trace of a request; none without one."""
    found: Mapping[str, str] = scope.get(_CONTEXT, {})
    return found


def from_environment() -> Tracing | None:
    """Tracing as OpenTelemetry's own variables say; None where they name no receiver, or switch it off."""
    is_off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if is_off or os.environ.get("OTEL_TRACES_EXPORTER") == "none" or not any(map(os.environ.get, _RECEIVERS)):
        return None
    if importlib.util.find_spec("opentelemetry") is None or importlib.util.find_spec("opentelemetry.sdk") is None:
        log.warning("the environment names a receiver of traces; to send them, run: %s", extras.install("otel"))
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": _SERVICE}
    provider = TracerProvider(resource=Resource.create(name))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)


class Tracing:
    """Makes the spans of requests."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider: Any = provider
        self._tracer: Tracer = provider.get_tracer("tritonlora")
        self._headers = TraceContextTextMapPropagator()

    @contextmanager
    def span(self, scope: Scope, record: Record) -> Iterator[None]:
        """The span of a request, which ends with the block, and tells what `record` says then."""
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        given = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        span = self._tracer.start_span(
            f"{scope['method']} {scope['path']}"[:200], self._headers.extract(given), SpanKind.SERVER
        )
        headers: dict[str, str] = {}
        scope[_CONTEXT] = headers
        self._headers.inject(headers, set_span_in_context(span))
        try:
            yield
        finally:
            for name, value in _attributes(scope, record).items():
                span.set_attribute(name, value)
            if record.status >= 500:
                span.set_status(StatusCode.ERROR, record.code or "")
            span.end()

    def close(self) -> None:
        """Send what has not been sent."""
        self._provider.shutdown()


def _attributes(scope: Scope, record: Record) -> dict[str, str | int | float]:
    """By the semantic conventions of HTTP and of generative AI."""
    found: dict[str, str | int | float] = {
        "http.request.method": scope["method"],
        "url.path": scope["path"],
        "http.response.status_code": record.status,
    }
    if record.model:
        found["gen_ai.request.model"] = record.model[:200]
    if record.code:
        found["error.type"] = record.code
    if record.first_token is not None:
        found["gen_ai.usage.input_tokens"] = record.prompt_tokens
        found["gen_ai.usage.output_tokens"] = record.generated_tokens
    return found
