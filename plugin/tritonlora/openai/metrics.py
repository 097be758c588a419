# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What the door counts, for Prometheus.

Nothing is counted for a token: the tokens of a request are added when it has ended. With several worker processes
prometheus_client adds up their values, which they keep in files of the directory PROMETHEUS_MULTIPROC_DIR.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import prometheus_client as prometheus
from prometheus_client import multiprocess
from starlette.types import Scope

from tritonlora.openai.api_error import STALLED, UNKNOWN_MODEL, ApiError
from tritonlora.serving.counters import UNKNOWN

MULTIPROCESS_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST
LEFT = 499  # the status of a request whose client left before its response began, as nginx has it
_ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/models")
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 180.0, 600.0)
_RECORD = "tritonlora.record"  # key of a request's scope


@dataclass(slots=True)
class Record:
    """What is known of one request under way."""

    began: float = field(default_factory=time.perf_counter)
    model: str = ""  # as the client named it
    status: int = LEFT
    code: str | None = None  # of its error
    prompt_tokens: int = 0
    generated_tokens: int = 0
    first_token: float | None = None  # seconds
    has_left: bool = False

    def failed(self, error: ApiError) -> None:
        """A stream that fails after its start counts with the status of its error, though the client saw 200."""
        self.status, self.code = error.status, error.code

    def responded(self) -> None:
        """The engine has sent a first token."""
        if self.first_token is None:
            self.first_token = time.perf_counter() - self.began


def record_of(scope: Scope) -> Record:
    """The record of a request."""
    found: Record = scope.setdefault(_RECORD, Record())
    return found


class Metrics:
    """The metrics of one door, and the names by which requests are labelled."""

    def __init__(self) -> None:
        prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = prometheus.CollectorRegistry()
        self._known: set[str] = set()
        self._requests = self._counter(
            "tritonlora_openai_requests_total", "Requests that have ended", "model", "endpoint", "status"
        )
        self._in_flight = prometheus.Gauge(
            "tritonlora_openai_requests_in_flight",
            "Requests under way",
            multiprocess_mode="livesum",
            registry=self._registry,
        )
        self._prompt_tokens = self._counter("tritonlora_openai_prompt_tokens_total", "Tokens of prompts", "model")
        self._tokens = self._counter("tritonlora_openai_generated_tokens_total", "Tokens of responses", "model")
        self._disconnects = self._counter(
            "tritonlora_openai_disconnects_total", "Requests whose client left before their end", "model"
        )
        self._stalls = self._counter(
            "tritonlora_openai_stalls_total", "Requests given up because the engine fell silent", "model"
        )
        self._first_token = self._histogram(
            "tritonlora_openai_time_to_first_token_seconds", "From a request to the engine's first token"
        )
        self._seconds = self._histogram(
            "tritonlora_openai_request_seconds", "From a request to the end of its response"
        )

    def _counter(self, name: str, text: str, *labels: str) -> prometheus.Counter:
        return prometheus.Counter(name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str) -> prometheus.Histogram:
        return prometheus.Histogram(name, text, ("endpoint",), buckets=_SECONDS, registry=self._registry)

    def know(self, names: Iterable[str]) -> None:
        """Requests for these models have a label of their own. The others share one: anybody may make up names."""
        self._known.update(names)

    def page(self) -> bytes:
        """The metrics of all worker processes, as Prometheus reads them."""
        directory = os.environ.get(MULTIPROCESS_DIRECTORY)
        if directory is None:
            return prometheus.generate_latest(self._registry)
        for pid in _dead_workers(Path(directory)):
            multiprocess.mark_process_dead(pid, directory)  # type: ignore[no-untyped-call]
        registry = prometheus.CollectorRegistry()
        multiprocess.MultiProcessCollector(registry, directory)  # type: ignore[no-untyped-call]
        return prometheus.generate_latest(registry)

    @contextlib.contextmanager
    def recorded(self, scope: Scope) -> Iterator[Record]:
        """The record of a request, which is counted when the block ends."""
        record, path = record_of(scope), scope["path"]
        endpoint = next((one for one in _ENDPOINTS if path == one or path.startswith(f"{one}/")), "other")
        self._in_flight.inc()
        try:
            yield record
        finally:
            self._in_flight.dec()
            self._count(record, endpoint)

    def _count(self, record: Record, endpoint: str) -> None:
        if record.first_token is not None:
            self.know([record.model])  # the server knows it
        model = record.model if record.model in self._known and record.code != UNKNOWN_MODEL else UNKNOWN
        self._requests.labels(model, endpoint, str(record.status)).inc()
        self._seconds.labels(endpoint).observe(time.perf_counter() - record.began)
        if record.first_token is not None:
            self._first_token.labels(endpoint).observe(record.first_token)
            self._prompt_tokens.labels(model).inc(record.prompt_tokens)
            self._tokens.labels(model).inc(record.generated_tokens)
        # From 0 on, or Prometheus would not see the first one.
        self._disconnects.labels(model).inc(record.has_left)
        self._stalls.labels(model).inc(record.code == STALLED)


def _dead_workers(directory: Path) -> Iterator[int]:
    """The processes that have ended, and left a number of requests under way."""
    for path in directory.glob("gauge_live*.db"):
        found = re.search(r"_(\d+)\.db$", path.name)
        if found and not Path("/proc", found[1]).exists():
            yield int(found[1])
