# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The router: forwards each request to the engine's model, for the adapter that it names.

This file only translates between Triton and `tritonlora.routing`, which decides. `execute` returns at once; every
request (every row of a batch) is answered from a thread of the pool, so that no stream holds up another.
"""

from __future__ import annotations

import functools
import itertools
import json
import secrets
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils

sys.path.insert(0, str(Path(__file__).parent))  # the copy beside this file, whatever else is installed

from router_reply import ENGINE_NEEDS, EngineError, Reply, engine_error, error_text, row_of, values_of

from tritonlora.errors import AdapterUnavailable, InvalidRequest
from tritonlora.forwarding import Forwarder, is_unavailable
from tritonlora.metrics import Metrics
from tritonlora.routing import Route, TableFile, map_tensors, most_adapters, resolve_rows, warmed

ROUTING_INPUTS = ("lora_name", "lora_task_id")
WATCH_SECONDS = 0.25


class TritonPythonModel:
    """One instance of the router."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the adapter table; the model does not load when there is no good one."""
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        directory = Path(args["model_repository"])
        self._repository = directory.parent
        self._target = parameters["target"]
        self._engine_outputs = {output["name"] for output in config["output"]} - {"previous_ids"}
        self._decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        self._cancels_bls = hasattr(pb_utils.InferenceRequest, "cancel")  # not in Triton 2.51
        self._probe_seconds = float(parameters["engine_probe_seconds"])
        self._target_stops = any(tensor["name"] == "stop" for tensor in config["input"])
        kinds = pb_utils.MetricFamily.COUNTER, pb_utils.MetricFamily.GAUGE
        self._metrics = Metrics(pb_utils.MetricFamily, *kinds)
        self._table = TableFile(directory / "adapters.json", self._table_failed, self._metrics.table_read)
        self._cache_pages = int(parameters["cache_pages"])
        self._forwarder = Forwarder(
            error_text,
            warmed=warmed(self._table.table()),
            cache_pages=self._cache_pages or None,
            cache_full_timeout=float(parameters["cache_full_timeout_seconds"]),
            load_timeout=float(parameters["load_timeout_seconds"]),
            on_load=lambda route, reason, seconds: self._metrics.loaded(route.lora_name, reason, seconds),
        )
        self._request_ids = (str(number) for number in itertools.count(secrets.randbits(62)))
        self._under_way = UnderWay()
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="lora_router_watch", daemon=True)
        self._watcher.start()
        self._pool = ThreadPoolExecutor(int(parameters["max_streams"]), thread_name_prefix="lora_router")

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> None:
        """Resolve the adapters of each request and hand its rows to the pool."""
        for request in requests:
            reply = Reply(request, self._decoupled)
            try:
                batch = request.inputs()[0].shape()[0]
                lora_names, lora_task_ids = (values_of(request, name) for name in ROUTING_INPUTS)
                routes = resolve_rows(self._table.table(), lora_names, lora_task_ids, batch)
                inputs = [tensor for tensor in request.inputs() if tensor.name() not in ROUTING_INPUTS]
                split = batch > 1 and (any(routes) or reply.is_stream)  # each row is a stream of its own
                rows = [row_of(inputs, row) for row in range(batch)] if split else [inputs]
                if len(rows) > 1 and not self._decoupled:
                    raise InvalidRequest("a batch of several rows for LoRA adapters needs a decoupled engine model")
            except Exception as error:  # noqa: BLE001  whatever it is, this request must be answered
                self._metrics.refused(reply.fail(error))
                reply.row_finished()
                continue
            reply.rows = len(rows)
            client_id = request.request_id() if len(rows) == 1 else ""
            for row, row_inputs in enumerate(rows):
                request_id = client_id or next(self._request_ids)
                self._pool.submit(self._answer, Row(request, reply, row, row_inputs, routes[row], request_id))

    def finalize(self) -> None:
        """End the threads without waiting for the engine."""
        self._closing.set()
        self._watcher.join()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, row: Row) -> None:
        """Answer one row."""
        reply = row.reply
        with self._metrics.request(row.route.lora_name if row.route else None) as counted:
            self._under_way.add(row)
            try:
                send = functools.partial(self._send, row)
                for answer in self._forwarder.forward(row.route, send, lambda: reply.client_left):
                    counted.runs = row.answered = True
                    row.heard_at = time.monotonic()
                    if reply.client_left:
                        # To its end all the same: Triton 2.51 hangs on answers that a BLS request does not take.
                        self._stop(row)
                        continue
                    if error := engine_error(answer):
                        raise EngineError(error, row.route)
                    if tensors := answer.output_tensors():  # the last one may be nothing but a flag
                        reply.send(tensors, row.number)
                if reply.client_left:
                    counted.outcome = "cancelled"
                else:
                    reply.end_of_stream(row.number)
            except Exception as error:  # noqa: BLE001
                counted.outcome = reply.fail(error)
            finally:
                self._under_way.discard(row)
                reply.row_finished()

    def _send(self, row: Row, attach: bool) -> Iterator[pb_utils.InferenceResponse]:
        """Send the request to the engine's model, and give its answers."""
        tensors = list(row.inputs)
        if row.route:
            task_id = torch.tensor([[row.route.entry.lora_task_id]], dtype=torch.uint64)
            tensors.append(pb_utils.Tensor.from_dlpack("lora_task_id", task_id))
        if row.route and attach:
            lora_weights, lora_config = map_tensors(self._repository, row.route)
            tensors.append(pb_utils.Tensor.from_dlpack("lora_weights", lora_weights))
            tensors.append(pb_utils.Tensor.from_dlpack("lora_config", lora_config))
        row.forwarded = self._request_to_engine(row, tensors, row.request_id)
        if self._decoupled:
            yield from row.forwarded.exec(decoupled=True)
        else:
            yield row.forwarded.exec()

    def _request_to_engine(
        self, row: Row, tensors: list[pb_utils.Tensor], request_id: str
    ) -> pb_utils.InferenceRequest:
        request = row.request
        return pb_utils.InferenceRequest(
            model_name=self._target,
            inputs=tensors,
            requested_output_names=sorted(self._engine_outputs & {*request.requested_output_names(), *ENGINE_NEEDS}),
            request_id=request_id,
            correlation_id=request.correlation_id(),
            timeout=request.timeout(),
            parameters=json.loads(request.parameters() or "{}"),
            trace=request.trace(),
        )

    # Beside the requests

    def _watch(self) -> None:
        """See now and then whose client has left, and bring the metrics up to date.

        Asking Triton takes as long as forwarding a token, so no stream asks for itself.
        """
        while not self._closing.wait(WATCH_SECONDS):
            try:
                rows = self._under_way.rows()
                for row in rows:
                    # A stream that has begun stops itself at its next answer.
                    if row.reply.look_for_client() and not row.answered:
                        self._stop(row)
                self._look_after_the_silent(rows)
                self._metrics.publish_info(most_adapters(self._table.table(), self._cache_pages))
            except Exception as error:  # noqa: BLE001  the next round must come
                pb_utils.Logger.log_error("".join(traceback.format_exception(error)))

    def _stop(self, row: Row) -> None:
        """Free the engine of a request that nobody waits for: by BLS, or by the engine's own `stop`.

        The latter goes by the request id, so it must not be the id of another request, too.
        """
        if row.forwarded is None or row.stopped:
            return
        row.stopped = True
        if self._cancels_bls:
            row.forwarded.cancel()
        elif self._target_stops and [one.request_id for one in self._under_way.rows()].count(row.request_id) == 1:
            self._send_stop(row, row.request_id)

    def _send_stop(self, row: Row, request_id: str) -> str | None:
        """The engine's `stop` for that id, with the inputs of a row, since some must be there; the error, if any."""
        tensors = [tensor for tensor in row.inputs if tensor.name() != "stop"]
        stop = self._request_to_engine(row, [*tensors, pb_utils.Tensor("stop", np.array([[True]]))], request_id)
        answers = stop.exec(decoupled=True) if self._decoupled else [stop.exec()]
        errors = [error for error in map(error_text, answers) if error]  # all of them are taken, see _answer
        return errors[0] if errors else None

    def _look_after_the_silent(self, rows: list[Row]) -> None:
        """Answer the requests of an engine whose process has died: Triton 2.51 leaves them waiting.

        Whether it lives is asked by a `stop` for an id that no request has. Only an engine in the Python backend has a
        process to lose; for others the parameter is 0, and nothing is asked.
        """
        if not self._probe_seconds or not self._target_stops:
            return
        now = time.monotonic()
        silent = [row for row in rows if row.forwarded and now - row.heard_at > self._probe_seconds]
        if not silent:
            return
        error = self._send_stop(silent[0], next(self._request_ids))
        for row in silent:
            row.heard_at = now
            if error and is_unavailable(error):
                row.reply.give_up(AdapterUnavailable("the engine's model stopped before it had answered"))

    def _table_failed(self, message: str) -> None:
        pb_utils.Logger.log_error(message)
        self._metrics.table_read(False)


class Row:
    """One row of a request, on its own way through the engine."""

    def __init__(
        self,
        request: pb_utils.InferenceRequest,
        reply: Reply,
        number: int,
        inputs: list[pb_utils.Tensor],
        route: Route | None,
        request_id: str,
    ) -> None:
        self.request = request
        self.reply = reply
        self.number = number
        self.inputs = inputs
        self.route = route
        self.request_id = request_id
        self.forwarded: Any = None  # the request to the engine, once there is one
        self.answered = False
        self.stopped = False  # the engine was asked to end it
        self.heard_at = time.monotonic()


class UnderWay:
    """The rows that are being answered. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: set[Row] = set()

    def add(self, row: Row) -> None:
        """It is."""
        with self._lock:
            self._rows.add(row)

    def discard(self, row: Row) -> None:
        """It is no more."""
        with self._lock:
            self._rows.discard(row)

    def rows(self) -> list[Row]:
        """Those that are now."""
        with self._lock:
            return list(self._rows)
