# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The model `lora_adapters`: lists the adapters for clients, and publishes the router's counts as Prometheus metrics.

It reads the files that the router's instances share, and sends the engine no requests.
"""

from __future__ import annotations

import fcntl
import json
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from . import metrics
from .counters import STATISTICS, read_statistics
from .errors import RequestError
from .listing import describe
from .residency import open_file_inside, open_inside, take_part
from .response_cache import check_config
from .routing import resolve
from .table_file import TableFile
from .triton import failure, parameters_in


class TritonPythonModel:
    """The only instance of `lora_adapters`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the router's adapter table, and start publishing metrics."""
        config = json.loads(args["model_config"])
        check_config(config)
        parameters = parameters_in(config)
        self._repository = Path(args["model_repository"]).parent
        router = parameters["router"]
        self._path = self._repository / router / "adapters.json"
        self._table = TableFile(self._path, pb_utils.Logger.log_error)
        table = self._table.table()
        self._residency = take_part(router, table)
        self._statistics = open_inside(self._residency.descriptor, STATISTICS)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._publish, args=(float(parameters["refresh_seconds"]),), daemon=True)
        self._thread.start()

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> list[pb_utils.InferenceResponse]:
        """Respond to each request with the listing: JSON, in the output `adapters` (1,) string."""
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        """Stop publishing, and close the files that the instances share."""
        self._stop.set()
        self._thread.join()
        self._residency.close()

    def _answer(self, request: pb_utils.InferenceRequest) -> pb_utils.InferenceResponse:
        try:
            asked = pb_utils.get_input_tensor_by_name(request, "lora_name")
            table = self._table.table()
            route = resolve(table, asked.as_numpy().reshape(-1)[0], None) if asked else None
            found = describe(table, self._repository, self._residency, only=route.lora_name if route else None)
        except RequestError as error:
            return failure(str(error), error.code)
        except Exception:  # noqa: BLE001  an error of one request must not fail the others
            pb_utils.Logger.log_error(traceback.format_exc())
            return failure("the listing failed on this request; the server's log says why", "INTERNAL")
        return pb_utils.InferenceResponse([pb_utils.Tensor("adapters", np.array([json.dumps(found)], np.object_))])

    def _publish(self, refresh_seconds: float) -> None:
        """Publish every `refresh_seconds` until `finalize`. Metrics that outlive `finalize` crash the stub."""
        publisher: Publisher | None = None
        with open_file_inside(self._residency.descriptor, "publisher", "wb") as lock:
            while not self._stop.wait(refresh_seconds):
                try:
                    # While a model is reloaded, two instances of it run for a time. Triton takes the metrics of both
                    # for the same, and the older instance deletes them when it ends (seen with 2.51: a crash).
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if publisher is None:
                        publisher = Publisher(TableFile(self._path, lambda _: None), self._statistics)
                    publisher.publish(self._residency.waiting())
                except BlockingIOError:
                    continue
                except Exception as error:  # noqa: BLE001  the next round may succeed
                    pb_utils.Logger.log_error("".join(traceback.format_exception(error)))
            del publisher


class Publisher:
    """Brings Triton's metrics in step with the counts of the router's instances.

    It uses `increment` only. Unlike `set`, `increment` releases the GIL while the server responds.
    """

    def __init__(self, table: TableFile, statistics: int) -> None:
        self._table = table
        self._statistics = statistics
        self._families = {family: new_family(family) for family in metrics.FAMILIES}
        self._metrics: dict[metrics.Key, Any] = {}
        self._published: dict[metrics.Key, float] = {}
        self._info: dict[str, str] | None = None

    def publish(self, waiting: list[int]) -> None:
        """Publish the counts once. `waiting` has the lora_task_ids of the requests that wait for capacity."""
        counts = read_statistics(self._statistics)
        for sample in list(metrics.increments(self._published, counts)):
            key = (sample.family, sample.labels)
            if key not in self._metrics:
                self._metrics[key] = self._families[sample.family].Metric(labels=dict(sample.labels))
            self._metrics[key].increment(sample.value)
            self._published[key] = self._published.get(key, 0.0) + sample.value
        table = self._table.table()
        names = [name for task_id in waiting if (name := table.name_of(task_id))]
        labels = metrics.info_labels(counts, names, len(table.entries))
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
