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
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils

sys.path.insert(0, str(Path(__file__).parent))  # the copy beside this file, whatever else is installed

from tritonlora.errors import InvalidRequest, RequestError
from tritonlora.routing import Forwarder, PreviousIds, Route, TableFile, map_tensors, public, resolve_rows

ROUTING_INPUTS = ("lora_name", "lora_task_id")
ENGINE_NEEDS = ("output_ids", "sequence_length")  # it refuses a request that does not ask for both


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
            warmed=[entry.lora_task_id for entry in self._table.table().entries.values() if entry.warm],
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
            for answer in self._forwarder.forward(route, send, reply.is_cancelled):
                if reply.is_cancelled():
                    return
                if error := engine_error(answer):
                    raise EngineError(error, route)
                if answer.output_tensors():  # the last answer of a decoupled model may be nothing but a flag
                    reply.send(answer.output_tensors(), row)
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


class EngineError(Exception):
    """An error that the engine answered, in words fit for the client."""

    def __init__(self, error: pb_utils.TritonError, route: Route | None) -> None:
        adapter = f"LoRA adapter {route.lora_name!r}: " if route else ""
        super().__init__(adapter + public(error.message()))
        self.code = error.code()


class Reply:
    """The answer to one request: what its rows send, and the final flag once all of them have finished."""

    def __init__(self, request: pb_utils.InferenceRequest, decoupled: bool) -> None:
        self.rows = 1
        self._sender = request.get_response_sender()
        self._decoupled = decoupled
        self._wanted = request.requested_output_names()
        self.is_stream = decoupled and any(values_of(request, "streaming") or [])
        self._detokenised = self.is_stream and "previous_ids" in self._wanted
        self._previous_ids: dict[int, PreviousIds] = {}
        self._lock = threading.Lock()
        self._finished_rows = 0
        self._answered = False
        self.is_cancelled = self._sender.is_cancelled

    def send(self, tensors: list[pb_utils.Tensor], row: int, *, ends: bool = False) -> None:
        """Pass on one answer of the engine: the outputs that the client asked for."""
        if self.rows > 1:  # the engine has seen a batch of one
            tensors = [tensor for tensor in tensors if tensor.name() != "batch_index"]
            tensors.append(pb_utils.Tensor("batch_index", np.array([[row]], np.int32)))
        if self._detokenised:
            output_ids, sequence_length = (tensor_of(tensors, name).as_numpy() for name in ENGINE_NEEDS)
            new = output_ids[0, 0, : sequence_length[0, 0]].tolist()
            previous_ids = self._previous_ids.setdefault(row, PreviousIds())
            # Without new tokens previous_ids mean the end of the stream, which the engine's answers never do.
            if ends or (new and output_ids.shape[1] == 1):
                tensors = [*tensors, pb_utils.Tensor("previous_ids", np.array([previous_ids.ids()], np.int32))]
            previous_ids.add(new)
        self._respond(pb_utils.InferenceResponse([tensor for tensor in tensors if tensor.name() in self._wanted]))

    def end_of_stream(self, row: int) -> None:
        """Tell the detokeniser, which holds back a character that is not complete, that no more tokens come."""
        if self._detokenised:
            nothing = (np.zeros((1, 1, 0), np.int32), np.zeros((1, 1), np.int32))
            tensors = [pb_utils.Tensor(name, value) for name, value in zip(ENGINE_NEEDS, nothing, strict=True)]
            self.send(tensors, row, ends=True)

    def fail(self, error: Exception) -> None:
        """Answer with an error: its own words if it is one for clients, else a log entry and INTERNAL."""
        if isinstance(error, RequestError):
            status = pb_utils.TritonError(str(error), getattr(pb_utils.TritonError, error.code))
        elif isinstance(error, EngineError):
            status = pb_utils.TritonError(str(error), error.code)
        else:
            pb_utils.Logger.log_error("".join(traceback.format_exception(error)))
            status = pb_utils.TritonError("the router failed on this request; the server's log says why")
        self._respond(pb_utils.InferenceResponse(error=status))

    def row_finished(self) -> None:
        """Send the final flag after the last row."""
        with self._lock:
            self._finished_rows += 1
            if self._finished_rows < self.rows:
                return
        if self._decoupled:
            self._sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        elif not self._answered:
            self.fail(RequestError("the engine's model sent no answer"))

    def _respond(self, response: pb_utils.InferenceResponse) -> None:
        if self._decoupled:
            with self._lock:
                self._sender.send(response)
        elif not self._answered:
            self._answered = True
            self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def engine_error(answer: pb_utils.InferenceResponse) -> pb_utils.TritonError | None:
    """The error in an answer of the engine."""
    return answer.error() if answer.has_error() else None


def error_text(answer: pb_utils.InferenceResponse) -> str | None:
    """The text of the error in an answer of the engine."""
    error = engine_error(answer)
    return error.message() if error else None


def values_of(request: pb_utils.InferenceRequest, name: str) -> list[Any] | None:
    """The elements of an input, or None when the request does not have it."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy().reshape(-1).tolist()


def tensor_of(tensors: list[pb_utils.Tensor], name: str) -> pb_utils.Tensor:
    """The tensor of that name."""
    return next(tensor for tensor in tensors if tensor.name() == name)


def row_of(inputs: list[pb_utils.Tensor], row: int) -> list[pb_utils.Tensor]:
    """One row of every input, as a batch of one."""
    return [pb_utils.Tensor(tensor.name(), tensor.as_numpy()[row : row + 1]) for tensor in inputs]
