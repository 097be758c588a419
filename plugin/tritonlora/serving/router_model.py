# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The router: forwards each request to the engine's model, for the adapter that the request names.

| module | does |
|---|---|
| `routing` | decides which adapter each row means |
| `forwarding` | decides when a request carries weights, when it waits, and what follows from an engine's error |
| `row_outputs` | decides which tensors of a response go to the client |
| `outgoing` | sends requests to the engine's model through Triton |
| `reply` | responds to the client through Triton |

An instance serves one request at a time, from its first token to its last; `outgoing` gives the reason. Triton runs one
instance for each concurrent stream, and one process for each instance (`instance_group` in config.pbtxt).

If the engine falls silent in the midst of a stream, the thread that serves the request is abandoned. Triton before
25.04 causes such silence: it loses an error that is not the first response to a BLS request, and the end of the stream
with it (python_backend src/infer_response.cc, SaveToSharedMemory, does not note which request the error belongs to).
"""

from __future__ import annotations

import functools
import gc
import json
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from .abandonable import Silence, Worker
from .adapter_tensors import DIGESTS, AdapterFiles
from .counters import BASE, STATISTICS, Statistics
from .errors import ClientLeft, EngineSilent, InvalidRequest, RequestError
from .forwarding import Forwarder
from .outgoing import Engine, Outgoing
from .parameters import check_parameters, parameters_of
from .reply import EngineError, Reply
from .residency import Residency, open_inside, take_part
from .response_cache import check_config
from .routing import Route, check_id, resolve_rows
from .row_outputs import OWN_OUTPUTS, RowOutputs, wanted_outputs
from .table_file import TableFile
from .triton import Inputs, inputs_of, parameters_in, values_of
from .wire import wire_of


class TritonPythonModel:
    """One instance of the router."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the adapter table. The model does not load without a valid table."""
        config = json.loads(args["model_config"])
        check_config(config)
        parameters = parameters_in(config)
        directory = Path(args["model_repository"])
        inputs = [one["name"] for one in config["input"]]
        wire = wire_of(inputs)
        self._batching = config["max_batch_size"] > 0
        self._decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        self._routing_inputs = ("lora_name", wire.task_id)
        self._needed_outputs = wire.needed_outputs
        self._name = args["model_name"]
        self._cache_pages = int(parameters.get("cache_pages", "0"))
        self._timeouts = {
            "cache_full_timeout": float(parameters["cache_full_timeout_seconds"]),
            "load_timeout": float(parameters["load_timeout_seconds"]),
        }
        self._table = TableFile(directory / "adapters.json", lambda _: None)  # the second one below reports problems
        self._residency = self._take_part()
        shared = self._residency.descriptor
        self._statistics = Statistics(open_inside(shared, STATISTICS))
        self._table = TableFile(directory / "adapters.json", self._table_failed)
        self._seen_table = self._table.table()
        self._forwarder = self._new_forwarder()
        self._engine = Engine(
            parameters["target"],
            wire,
            AdapterFiles(directory.parent, open_inside(shared, DIGESTS)),
            inputs=inputs,
            outputs={output["name"] for output in config["output"]} - OWN_OUTPUTS,
            decoupled=self._decoupled,
            batching=self._batching,
            gives=lambda route: check_id(route, self._residency.gives),
        )
        self._patience = (
            float(parameters.get("first_answer_timeout_seconds", "3600")),
            float(parameters.get("stall_timeout_seconds", "300")),
        )
        self._worker = Worker()
        self._last_replies: deque[Reply] = deque(maxlen=4)
        gc.freeze()  # otherwise a full collection, in the midst of a response, takes 70 ms for the objects made so far

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> None:
        """Serve the requests, one after the other."""
        for request in requests:
            reply = Reply(request, decoupled=self._decoupled)
            silence = Silence(*self._patience)
            names: list[str] = []  # of the adapters of its rows; `_serve` fills it
            serve = functools.partial(self._serve, request, reply, silence, names)
            is_done = self._worker.do(serve, silence.is_too_long)
            if not is_done:
                reply.fail(EngineSilent(f"the engine's model has sent nothing for {silence.seconds():.3g} s"))
            self._count(names, "running", -1)
            self._count(names or [BASE], reply.outcome)
            reply.complete()
            self._last_replies.append(reply)
            if not is_done:
                self._leave_behind()

    def finalize(self) -> None:
        """End the thread, and close the files that the instances share."""
        self._worker.end()
        self._engine.finalize()
        self._last_replies.clear()
        self._residency.close()

    # One request

    def _serve(self, request: pb_utils.InferenceRequest, reply: Reply, silence: Silence, names: list[str]) -> None:
        """Serve one request, and add the names of its rows' adapters to `names`."""
        try:
            inputs, parameters = inputs_of(request), parameters_of(request)
            routes = self._routes(inputs, parameters)
            names += [route.lora_name if route else BASE for route in routes]
            self._count(names, "running")
            wanted = wanted_outputs(
                request.requested_output_names(), self._needed_outputs, is_stream=self._is_stream(inputs)
            )
            outgoing = self._engine.request(request, parameters, wanted.of_engine, silence)
            beam_widths, sequence_counts = (values_of(inputs, name) for name in ("beam_width", "num_return_sequences"))
            for row, tensors in self._rows(inputs, routes):
                outputs = RowOutputs(
                    wanted,
                    pb_utils.Tensor,
                    row=row,
                    beam_width=beam_widths[row or 0] if beam_widths else 1,
                    sequence_count=sequence_counts[row or 0] if sequence_counts else 1,
                )
                route = routes[row or 0]
                if not self._answer(outgoing(tensors, route), route, outputs, reply):
                    return
            reply.succeed()
        except Exception as error:  # noqa: BLE001  any error must become the request's response
            reply.fail(error)

    def _routes(self, inputs: Inputs, parameters: dict[str, Any]) -> list[Route | None]:
        """The adapter of each row; None for the base model."""
        table = self._table.table()
        if table is not self._seen_table:
            self._seen_table = table
            self._engine.forget_names()
            self._statistics.add(BASE, "table_reloads")
        if parameters:
            check_parameters(table, parameters)
        lora_names, lora_task_ids = (values_of(inputs, name) for name in self._routing_inputs)
        rows = next(iter(inputs.values())).shape()[0] if self._batching else 1
        return resolve_rows(table, lora_names, lora_task_ids, rows)

    def _is_stream(self, inputs: Inputs) -> bool:
        return self._decoupled and any(values_of(inputs, "streaming") or [])

    def _rows(
        self, inputs: Inputs, routes: Sequence[Route | None]
    ) -> Iterator[tuple[int | None, list[pb_utils.Tensor]]]:
        """(row, tensors) of each request to the engine.

        The rows of a batch go one by one if they name adapters or are streamed. Otherwise the batch goes as a whole,
        and its row is None.
        """
        tensors = [tensor for name, tensor in inputs.items() if name not in self._routing_inputs]
        if len(routes) == 1 or not (any(routes) or self._is_stream(inputs)):
            yield None, tensors
            return
        if not self._decoupled:
            raise InvalidRequest("a batch of several rows for LoRA adapters needs a decoupled engine model")
        for row in range(len(routes)):
            yield row, [pb_utils.Tensor(one.name(), one.as_numpy()[row : row + 1]) for one in tensors]

    def _answer(
        self, outgoing: Outgoing, route: Route | None, outputs: RowOutputs[pb_utils.Tensor], reply: Reply
    ) -> bool:
        """Pass on the engine's responses to one of its requests; False when the reply has ended with an error."""
        responses = self._forwarder.forward(route, outgoing.send, reply.has_left)
        is_answered = has_left = False
        try:
            for response in responses:
                if reply.is_complete:
                    continue  # this thread was abandoned, and another one has completed the reply
                if reply.has_left():
                    if not has_left:
                        outgoing.cancel()
                    has_left = True
                elif error := engine_error(response):
                    raise EngineError(error, route)
                elif tensors := response.output_tensors():  # the last response may be the final flag alone
                    reply.send(outputs.of_response(tensors))
                    is_answered = True
        except Exception as error:  # noqa: BLE001  the stream must be read to its end after any error
            reply.fail(error)
            reply.complete()  # before the rest of the stream is read, so that the client need not wait for it
            deque(responses, maxlen=0)
            return False
        if has_left or reply.is_complete:
            raise ClientLeft("the client has left")
        if not is_answered:
            raise RequestError("the engine's model sent no response")
        for last in outputs.of_end():
            reply.send(last)
        return True

    # The files that the instances share

    def _leave_behind(self) -> None:
        """Release the locks of the abandoned request. Its thread keeps the old objects, in case that it goes on."""
        self._engine.left_behind()
        behind = self._residency
        self._residency = self._take_part()
        self._forwarder = self._new_forwarder()
        behind.abandon()

    def _take_part(self) -> Residency:
        return take_part(self._name, self._table.table(), self._cache_pages)

    def _new_forwarder(self) -> Forwarder[pb_utils.InferenceResponse]:
        return Forwarder(self._residency, _error_text, on_load=self._loaded, **self._timeouts)

    def _count(self, names: list[str], column: str, amount: float = 1) -> None:
        for name in names:
            self._statistics.add(name, column, amount)

    def _loaded(self, route: Route, reason: str, seconds: float) -> None:
        self._statistics.add(route.lora_name, reason)
        self._statistics.add(route.lora_name, "load_seconds", seconds)

    def _table_failed(self, problem: str) -> None:
        pb_utils.Logger.log_error(problem)
        self._statistics.add(BASE, "table_failures")


def engine_error(response: pb_utils.InferenceResponse) -> pb_utils.TritonError | None:
    """The error in a response of the engine, or None."""
    return response.error() if response.has_error() else None


def _error_text(response: pb_utils.InferenceResponse) -> str | None:
    error = engine_error(response)
    return error.message() if error else None
