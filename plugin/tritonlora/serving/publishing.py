# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Publishes the resolver's metrics as metrics of the server.

While a model is reloaded, two instances of it run for a time. Triton takes the metrics of both for the same, and the
older instance deletes them when it ends (seen with 2.51: a crash). So one process of a server publishes at a time. It
holds a socket in the abstract namespace of Linux, which ends with the process.
"""

from __future__ import annotations

import socket
import threading
import time
import traceback
from collections.abc import Callable
from itertools import chain
from typing import Any

import triton_python_backend_utils as pb_utils

from . import metrics
from .counters import BUCKETS, Counts
from .server_process import name_for


class Publishing:
    """A thread that publishes snapshots until `stop`. Metrics that outlive the model's `finalize` crash the stub."""

    def __init__(self, snapshot: Callable[[], metrics.Snapshot], refresh_seconds: float, model: str) -> None:
        self._snapshot = snapshot
        self._refresh_seconds = refresh_seconds
        self._address = f"\0{name_for(model)}"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        publisher: Publisher | None = None
        with socket.socket(socket.AF_UNIX) as lock:
            while not self._stop.wait(self._refresh_seconds):
                try:
                    if publisher is None:
                        lock.bind(self._address)
                        publisher = Publisher()
                    publisher.publish(self._snapshot())
                except Exception as error:  # noqa: BLE001  the next round may succeed
                    if publisher is not None or not isinstance(error, OSError):
                        pb_utils.Logger.log_error("".join(traceback.format_exception(error)))
            del publisher  # before another process may publish


class Publisher:
    """Brings Triton's metrics in step with snapshots.

    It uses `increment` and `observe` only. Unlike `set`, these release the GIL while the server responds.
    """

    def __init__(self) -> None:
        self._families: dict[metrics.Family, pb_utils.MetricFamily] = {}
        self._metrics: dict[metrics.Family, dict[tuple[str, ...], Any]] = {}
        self._published: dict[metrics.Family, dict[tuple[str, ...], float]] = {}
        for family in metrics.FAMILIES:
            self._begin(family)
        self._rows: Counts | None = None  # of the last snapshot
        self._observed = {family: [(0, 0.0)] * (len(BUCKETS) + 1) for family in metrics.HISTOGRAMS}
        for family in metrics.HISTOGRAMS:
            self._metrics[family][()] = self._families[family].Metric(labels={}, buckets=[*BUCKETS])

    def publish(self, snapshot: metrics.Snapshot) -> None:
        """Publish a snapshot."""
        if self._rows is None:
            self._rows = {}
            self._clear(snapshot)
        state = [*metrics.samples_of_state(snapshot, time.time())]
        for family in metrics.outdated(self._published, state):
            self._begin(family)
        rows = metrics.changed(self._rows, snapshot.counts)
        for sample in metrics.increments(self._published, chain(metrics.samples_of_rows(rows), state)):
            family, labels = sample.family, sample.labels
            metric = self._metric(family, labels)
            if sample.value:
                metric.increment(sample.value)
            self._published[family][labels] = self._published[family].get(labels, 0.0) + sample.value
        self._rows = snapshot.counts
        for family, bucket, number, value in metrics.observations(self._observed, snapshot.times):
            for _ in range(number):
                self._metrics[family][()].observe(value)
            before, total = self._observed[family][bucket]
            self._observed[family][bucket] = (before + number, total + number * value)

    def _metric(self, family: metrics.Family, labels: tuple[str, ...]) -> Any:
        """The series with these labels, which is made if it is not there."""
        if labels not in self._metrics[family]:
            named = dict(zip(family.labels, labels, strict=True))
            self._metrics[family][labels] = self._families[family].Metric(labels=named)
        return self._metrics[family][labels]

    def _clear(self, snapshot: metrics.Snapshot) -> None:
        """End the series of gauges that a killed resolver has left.

        Triton keeps them, and a new metric with the same labels goes on from their value. It ends them when it ends the
        new one.
        """
        for family, labels in metrics.gauges_of(snapshot.adapters):
            self._metric(family, labels)
        for family in [*self._metrics]:
            if family.type == "gauge":
                self._begin(family)

    def _begin(self, family: metrics.Family) -> None:
        """Make a family without series. A series lives as long as its family, so that this ends the series before."""
        self._metrics[family], self._published[family] = {}, {}
        self._families.pop(family, None)
        kind = getattr(pb_utils.MetricFamily, family.type.upper())
        self._families[family] = pb_utils.MetricFamily(family.name, family.description, kind)
