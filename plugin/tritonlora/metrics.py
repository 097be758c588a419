# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The router's metrics on Triton's metrics port.

`lora_requests_info` is what the model server protocol of the Kubernetes Gateway API Inference Extension asks for: its
labels say which adapters run and wait, its value is the unix time of the last update.

Metrics cost a message to the server's process each, so none is touched for a token. Triton keeps a series as long as
the Python object of its family lives, so `lora_requests_info`, of which there is one at a time, has a new family each
time that its labels change.

This file runs inside a plain Triton container: standard library only.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# No adapter's name has brackets.
BASE, UNKNOWN, OTHER = "(base)", "(unknown)", "(other)"
# Adapters come and go while the server runs; a label has no more values than this.
MOST_NAMES = 1000

COUNTERS = {
    "lora_router_requests_total": "Requests by adapter and outcome: ok, cancelled, or the error code",
    "lora_router_loads_total": "Adapters that the engine took from the router, by adapter and reason",
    "lora_router_load_seconds_total": "Seconds from sending an adapter's weights to the first answer, by adapter",
    "lora_router_table_reloads_total": "Times that a changed adapters.json was read",
    "lora_router_table_reload_failures_total": "Times that a changed adapters.json was refused",
}
GAUGES = {"lora_router_requests_in_flight": "Requests under way by adapter"}
INFO = ("lora_requests_info", "Adapters that run and wait; the value is the time of the last update")


@dataclass(slots=True)
class InFlight:
    """One request; `outcome` is set before it ends."""

    outcome: str = "ok"
    runs: bool = False  # the engine has begun to answer


class Metrics:
    """Counts what the router does. Thread-safe."""

    def __init__(self, family: Callable[[str, str, Any], Any], counter: object, gauge: object) -> None:
        """`family(name, description, kind)` makes a `pb_utils.MetricFamily`."""
        self._new_info: Callable[[], Any] = lambda: family(*INFO, gauge)
        self._families = {
            **{name: family(name, description, counter) for name, description in COUNTERS.items()},
            **{name: family(name, description, gauge) for name, description in GAUGES.items()},
        }
        self._lock = threading.Lock()
        self._series: dict[tuple[str, ...], Any] = {}
        self._names: set[str] = {BASE, UNKNOWN, OTHER}
        self._under_way: dict[int, tuple[str, InFlight]] = {}
        self._info: tuple[dict[str, str], Any, Any] | None = None  # labels, family, metric
        for name in ("lora_router_table_reloads_total", "lora_router_table_reload_failures_total"):
            self._increment(name, 0)

    @contextmanager
    def request(self, lora_name: str | None) -> Iterator[InFlight]:
        """A request for an adapter, None: for the base model; counted when it ends."""
        name = self._bounded(lora_name or BASE)
        in_flight = InFlight()
        with self._lock:
            self._under_way[id(in_flight)] = (name, in_flight)
        self._add_in_flight(name, 1)
        try:
            yield in_flight
        finally:
            with self._lock:
                del self._under_way[id(in_flight)]
            self._add_in_flight(name, -1)
            self._increment("lora_router_requests_total", 1, lora_name=name, outcome=in_flight.outcome)

    def refused(self, outcome: str) -> None:
        """A request that named no adapter that there is."""
        self._increment("lora_router_requests_total", 1, lora_name=UNKNOWN, outcome=outcome)

    def loaded(self, lora_name: str, reason: str, seconds: float) -> None:
        """The engine took an adapter's weights."""
        name = self._bounded(lora_name)
        self._increment("lora_router_loads_total", 1, lora_name=name, reason=reason)
        self._increment("lora_router_load_seconds_total", seconds, lora_name=name)

    def table_read(self, good: bool = True) -> None:
        """adapters.json had changed, and was read, or refused."""
        self._increment(f"lora_router_table_reload{'s' if good else '_failures'}_total", 1)

    def publish_info(self, max_lora: int) -> None:
        """Bring lora_requests_info up to date. Called now and then, by one thread."""
        with self._lock:
            under_way = [(name, one.runs) for name, one in self._under_way.values() if name not in (BASE, OTHER)]
        running = {name for name, runs in under_way if runs}
        waiting = {name for name, runs in under_way if not runs} - running
        labels = {
            "max_lora": str(max_lora),
            "running_lora_adapters": ",".join(sorted(running)),
            "waiting_lora_adapters": ",".join(sorted(waiting)),
        }
        if self._info is None or self._info[0] != labels:
            self._info = None  # first, so that there are never two
            info = self._new_info()
            self._info = (labels, info, info.Metric(labels=labels))
        self._info[2].set(time.time())

    def _bounded(self, name: str) -> str:
        with self._lock:
            if name in self._names or len(self._names) < MOST_NAMES:
                self._names.add(name)
                return name
        return OTHER

    def _add_in_flight(self, name: str, number: int) -> None:
        # Added to, not set: the instances of the router share the metric.
        self._increment("lora_router_requests_in_flight", number, lora_name=name)

    def _increment(self, family: str, by: float, **labels: str) -> None:
        with self._lock:
            self._metric(family, **labels).increment(by)

    def _metric(self, family: str, **labels: str) -> Any:
        key = (family, *labels.values())
        if key not in self._series:
            self._series[key] = self._families[family].Metric(labels=labels)
        return self._series[key]
