# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Publishes the resolver's counts as Prometheus metrics of the server.

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
from typing import Any

import triton_python_backend_utils as pb_utils

from . import metrics
from .counters import Counts
from .server_process import name_for

Names = tuple[list[str], list[str], int]  # adapters in use, adapters that requests wait for, the number of all adapters


class Publishing:
    """A thread that publishes the counts until `stop`. Metrics that outlive the model's `finalize` crash the stub."""

    def __init__(
        self, counts: Callable[[], Counts], names: Callable[[], Names], refresh_seconds: float, model: str
    ) -> None:
        self._counts = counts
        self._names = names
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
                    publisher.publish(self._counts(), *self._names())
                except Exception as error:  # noqa: BLE001  the next round may succeed
                    if publisher is not None or not isinstance(error, OSError):
                        pb_utils.Logger.log_error("".join(traceback.format_exception(error)))
            del publisher  # before another process may publish


class Publisher:
    """Brings Triton's metrics in step with counts.

    It uses `increment` only. Unlike `set`, `increment` releases the GIL while the server responds.
    """

    def __init__(self) -> None:
        self._families = {family: new_family(family) for family in metrics.FAMILIES}
        self._metrics: dict[metrics.Key, Any] = {}
        self._published: dict[metrics.Key, float] = {}
        self._info: dict[str, str] | None = None

    def publish(self, counts: Counts, in_use: list[str], waiting: list[str], max_lora: int) -> None:
        """Publish the counts once."""
        for sample in list(metrics.increments(self._published, counts)):
            key = (sample.family, sample.labels)
            if key not in self._metrics:
                self._metrics[key] = self._families[sample.family].Metric(labels=dict(sample.labels))
            self._metrics[key].increment(sample.value)
            self._published[key] = self._published.get(key, 0.0) + sample.value
        labels = metrics.info_labels(in_use, waiting, max_lora)
        if labels != self._info:
            # A metric lives as long as its family. So the family is made anew, or the old labels would stay, too.
            del self._families[metrics.INFO]
            self._families[metrics.INFO] = new_family(metrics.INFO)
            self._families[metrics.INFO].Metric(labels=labels).increment(time.time())
            self._info = labels


def new_family(family: metrics.Family) -> pb_utils.MetricFamily:
    """`family` as a metric family of Triton."""
    kind = pb_utils.MetricFamily.COUNTER if family.is_counter else pb_utils.MetricFamily.GAUGE
    return pb_utils.MetricFamily(family.name, family.description, kind)
