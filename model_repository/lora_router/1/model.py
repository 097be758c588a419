# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The router: forwards each request to the engine's model, for the adapter that it names.

This file only translates between Triton and `tritonlora.routing`, which decides. `execute` returns at once; every
request (every row of a batch) is answered from a thread of the pool, so that no stream holds up another.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import triton_python_backend_utils as pb_utils

sys.path.insert(0, str(Path(__file__).parent))  # the copy beside this file, whatever else is installed

from router_reply import ENGINE_NEEDS, EngineError, Reply, engine_error, error_text, row_of, values_of

from tritonlora.errors import InvalidRequest
from tritonlora.forwarding import Forwarder
from tritonlora.routing import Route, TableFile, map_tensors, resolve_rows, warmed

ROUTING_INPUTS = ("lora_name", "lora_task_id")


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
        self._table = TableFile(directory / "adapters.json", pb_utils.Logger.log_error)
        self._forwarder = Forwarder(
            error_text,
            warmed=warmed(self._table.table()),
            cache_pages=int(parameters["cache_pages"]) or None,
            cache_full_timeout=float(parameters["cache_full_timeout_seconds"]),
            load_timeout=float(parameters["load_timeout_seconds"]),
        )
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
                reply.fail(error)
                reply.row_finished()
                continue
            reply.rows = len(rows)
            for row, row_inputs in enumerate(rows):
                self._pool.submit(self._answer, request, reply, row, row_inputs, routes[row])

    def finalize(self) -> None:
        """End the pool without waiting for the engine."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _answer(
        self,
        request: pb_utils.InferenceRequest,
        reply: Reply,
        row: int,
        inputs: list[pb_utils.Tensor],
        route: Route | None,
    ) -> None:
        """Answer one row."""
        try:
            send = functools.partial(self._send, request, inputs, route)
            # Whether the client has left is not asked: Triton 2.51 does not survive `is_cancelled` under load, and
            # hangs on answers that a BLS request does not take. All are taken, and Triton drops what nobody wants.
            for answer in self._forwarder.forward(route, send):
                if error := engine_error(answer):
                    raise EngineError(error, route)
                if tensors := answer.output_tensors():  # the last one may be nothing but a flag
                    reply.send(tensors, row)
            reply.end_of_stream(row)
        except Exception as error:  # noqa: BLE001
            reply.fail(error)
        finally:
            reply.row_finished()

    def _send(
        self, request: pb_utils.InferenceRequest, inputs: list[pb_utils.Tensor], route: Route | None, attach: bool
    ) -> Iterator[pb_utils.InferenceResponse]:
        """Send the request to the engine's model, and give its answers."""
        tensors = list(inputs)
        if route:
            task_id = torch.tensor([[route.entry.lora_task_id]], dtype=torch.uint64)
            tensors.append(pb_utils.Tensor.from_dlpack("lora_task_id", task_id))
        if route and attach:
            lora_weights, lora_config = map_tensors(self._repository, route)
            tensors.append(pb_utils.Tensor.from_dlpack("lora_weights", lora_weights))
            tensors.append(pb_utils.Tensor.from_dlpack("lora_config", lora_config))
        forwarded = pb_utils.InferenceRequest(
            model_name=self._target,
            inputs=tensors,
            requested_output_names=sorted(self._engine_outputs & {*request.requested_output_names(), *ENGINE_NEEDS}),
            request_id=request.request_id(),
            correlation_id=request.correlation_id(),
            timeout=request.timeout(),
            parameters=json.loads(request.parameters() or "{}"),
            trace=request.trace(),
        )
        if self._decoupled:
            yield from forwarded.exec(decoupled=True)
        else:
            yield forwarded.exec()
