# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The resolver: responds with the lora_task_id of a request's adapter, once the engine can serve the adapter.

It is a step of an ensemble, before the engine's model, so that tokens never pass through Python.

This module translates between Triton and the modules that decide: `routing`, `admission` and `dispatcher`. `execute`
returns at once. Each request gets its response when it may go on.
"""

from __future__ import annotations

import json
import os
import threading
import time
import traceback
from pathlib import Path

import triton_python_backend_utils as pb_utils

from .adapter_tensors import DIGESTS, AdapterFiles
from .admission import PROMPT_TOKENS_A_STEP, Admission, Ticket
from .counters import BASE, STATISTICS, Statistics
from .dispatcher import Dispatcher
from .engine_cache import EngineCache
from .errors import InvalidRequest, RequestError
from .own_requests import Guard, OwnRequests, task_id_tensor
from .parameters import check_parameters, parameters_of
from .residency import open_inside, take_part
from .response_cache import check_config
from .routing import Route, check_id, resolve_rows
from .server_process import STARTING_SECONDS, is_starting, started_at, warmed_at_start
from .table_file import TableFile
from .triton import failure, inputs_of, new_kept_weights, parameters_in, values_of
from .wire import CONTROL, ENGINE_MODEL, INPUT_LENGTHS, REQUIRED

LONGEST_OUTPUT = 4096  # tokens of a request that does not tell its output length or its input length
# The router loads adapters into the same engine. For so long after the router's last request, the resolver is certain
# of nothing.
ROUTER_SECONDS = 60.0
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
FAILED = "the resolver failed on this request; the server's log says why"


class TritonPythonModel:
    """The only instance of the resolver."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the router's adapter table, and start the dispatcher. The model does not load without a valid table."""
        config = json.loads(args["model_config"])
        check_config(config)
        parameters = parameters_in(config)
        repository = Path(args["model_repository"]).parent
        self._batching = config["max_batch_size"] > 0
        self._patience = float(parameters["cache_full_timeout_seconds"])
        path = repository / parameters["router"] / "adapters.json"
        table = TableFile(path, lambda _: None).table()  # the second TableFile below reports malformed entries
        self._residency = take_part(parameters["router"], table)
        shared = self._residency.descriptor
        self._counting = threading.Lock()
        self._statistics = Statistics(open_inside(shared, STATISTICS))
        self._files = AdapterFiles(repository, open_inside(shared, DIGESTS))
        self._kept = new_kept_weights()
        self._table = TableFile(path, self._table_failed)
        self._seen_table = self._table.table()
        self._routes: dict[int, Route] = {}  # lora_task_id -> the adapter that requests asked for
        self._was_loaded: set[int] = set()
        self._capacity = int(parameters["cache_pages"])
        server, now = os.getppid(), time.monotonic()
        is_fresh = is_starting(server)
        warm = warmed_at_start(self._seen_table, started_at(server)) if is_fresh else {}
        cache = EngineCache(self._capacity, warm, now, is_fresh=is_fresh)
        self._guard = Guard(args["model_name"])
        self._engine = OwnRequests(
            parameters["target"],
            parameters["engine_request"],
            self._files,
            self._routes.get,
            self._gives,
            self._guard,
            decoupled=parameters["target_is_decoupled"] == "true",
        )
        self._dispatcher = Dispatcher(
            Admission(cache, now, cautious_for=0.0 if is_fresh else STARTING_SECONDS),
            self._engine,
            load_timeout=float(parameters["load_timeout_seconds"]),
            on_error=pb_utils.Logger.log_error,
            on_load=self._loaded,
            on_miss=lambda task_id: self.count([self._routes[task_id].lora_name], "unexpected_misses"),
        )

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> None:
        """Begin each request by itself: a bad request harms no other, and no request waits for another one."""
        for request in requests:
            if values_of(inputs_of(request), CONTROL) == [self._guard.key.encode()]:
                self._guard.arrive(request.get_response_sender())
                continue
            pending = PendingRequest(self, request)
            try:
                self._begin(request, pending)
            except Exception as error:  # noqa: BLE001  any error must become the request's response
                pending.fail(error)

    def finalize(self) -> None:
        """Refuse the requests that wait, and close the files that the router's instances share."""
        self._dispatcher.stop()
        self._engine.finalize()
        self._residency.close()

    def _begin(self, request: pb_utils.InferenceRequest, pending: PendingRequest) -> None:
        table = self._table.table()
        if table is not self._seen_table:
            self._seen_table = table
            self.count([BASE], "table_reloads")
        check_parameters(table, parameters_of(request))
        inputs = inputs_of(request)
        if CONTROL in inputs:
            raise InvalidRequest(f"{CONTROL} is no input for clients; leave it out")
        lora_names, lora_task_ids = (values_of(inputs, name) for name in ("lora_name", ENGINE_MODEL.task_id))
        rows = next(iter(inputs.values())).shape()[0] if self._batching else 1
        routes = resolve_rows(table, lora_names, lora_task_ids, rows)
        pending.routes = [route for route in routes if route]
        if not pending.routes:
            pending.pass_on(with_weights=False)
            return
        for route in pending.routes:
            check_id(route, self._residency.may_give)
            self._routes[route.entry.lora_task_id] = route
        lengths = values_of(inputs, REQUIRED) or [LONGEST_OUTPUT]
        prompts = values_of(inputs, INPUT_LENGTHS) or [LONGEST_OUTPUT]
        ticket = Ticket(
            {route.entry.lora_task_id: route.entry.pages or self._capacity for route in pending.routes},
            max(1, *lengths) + max(0, *prompts) / PROMPT_TOKENS_A_STEP,
            time.monotonic(),
            self._patience,
            takes_weights=rows == 1,  # the engine takes them in a batch of one
            must_take_weights=rows == 1 and self._residency.was_used_lately(ROUTER_SECONDS),
        )
        self._dispatcher.ask(ticket, pending)

    def weights_of(self, route: Route) -> list[pb_utils.Tensor]:
        """lora_weights and lora_config, to be sent once. Call `weights_sent` after sending them."""
        weights, config = self._kept.tensor(self._files.weights(route)), self._files.config(route)
        self._gives(route)
        return [weights, pb_utils.Tensor("lora_config", config)]

    def weights_sent(self, route: Route) -> None:
        """Note that the adapter's weights were sent to the engine's step."""
        self._kept.sent()
        self._loaded(route.entry.lora_task_id, 0.0)

    def count(self, names: list[str], column: str, amount: float = 1.0) -> None:
        """Add `amount` to a column, one of `counters.COLUMNS`, of these adapters."""
        with self._counting:
            for name in names:
                self._statistics.add(name, column, amount)

    def _gives(self, route: Route) -> None:
        check_id(route, self._residency.gives)

    def _loaded(self, task_id: int, seconds: float) -> None:
        names = [self._routes[task_id].lora_name]
        self.count(names, "evicted" if task_id in self._was_loaded else "first_use")
        self.count(names, "load_seconds", seconds)
        self._was_loaded.add(task_id)

    def _table_failed(self, problem: str) -> None:
        pb_utils.Logger.log_error(problem)
        self.count([BASE], "table_failures")


class PendingRequest:
    """A request from its arrival to its response. It implements `dispatcher.Request`."""

    def __init__(self, model: TritonPythonModel, request: pb_utils.InferenceRequest) -> None:
        self._model = model
        self._sender = request.get_response_sender()
        asked = {REQUIRED} & set(request.requested_output_names())
        # The response returns request_output_len as it came. Triton's response cache turns an error into an empty
        # response, which must not mean the base model. An older ensemble neither sends nor requests this tensor.
        self._required = [(one.name(), one.as_numpy()) for one in request.inputs() if one.name() in asked]
        self.routes: list[Route] = []  # the adapters of its rows; empty for the base model

    def pass_on(self, *, with_weights: bool) -> None:
        """Respond with the engine's LoRA inputs for the rows: lora_task_id, and the weights if `with_weights`."""
        tensors = [pb_utils.Tensor(name, array) for name, array in self._required]
        if self.routes:
            tensors.append(task_id_tensor([route.entry.lora_task_id for route in self.routes]))
        if with_weights:
            tensors += self._model.weights_of(self.routes[0])
        self._sender.send(pb_utils.InferenceResponse(tensors), flags=FINAL)
        if with_weights:
            self._model.weights_sent(self.routes[0])
        self._model.count(self._names(), "OK")

    def fail(self, error: Exception) -> None:
        """Respond with the error. A RequestError goes to the client; any other error to the log, and as INTERNAL."""
        code, message = "INTERNAL", FAILED
        if isinstance(error, RequestError):
            code, message = error.code, self._about(error)
        else:
            pb_utils.Logger.log_error("".join(traceback.format_exception(error)))
        self._sender.send(failure(message, code), flags=FINAL)
        self._model.count(self._names(), code)

    def _names(self) -> list[str]:
        return [route.lora_name for route in self.routes] or [BASE]

    def _about(self, error: RequestError) -> str:
        """The error's text, with the adapter's name in front if the text does not have it."""
        message = str(error).encode(errors="replace").decode()  # Triton takes no lone surrogates
        if not self.routes or "LoRA adapter" in message:
            return message
        return f"LoRA adapter {self.routes[0].lora_name!r}: {message}"
